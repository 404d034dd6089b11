// Finds the chunk size, queue depth and number of workers with which this machine reads a disk fastest, and keeps them.
//
// The disk is searched first, from settings that lie far apart to what lies beside the fastest; then, from the page
// cache, the number of workers, and for a GPU the chunk size and staging memory, too. In the end the setting that was
// found and the default are measured in turns, because the fastest of many noisy measurements is often so by chance.
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "bench/support/device_memory.h"
#include "bench/support/measure.h"
#include "bench/support/open_file.h"
#include "bench/support/page_cache.h"
#include "bench/support/roofline.h"
#include "bench/support/tuning.h"
#include "flashpack/engine.h"
#include "flashpack/tuning.h"
#include "tools/tune_report.h"
#include "tools/tune_subject.h"

namespace flashpack::bench {
namespace {

constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;
constexpr int kExitNotKept = 3;

using Clock = std::chrono::steady_clock;

struct Flags {
  std::filesystem::path path = ".";
  Device device;
  double budget_s = 60;
  double size_gib = 1;
  bool verify = false;
  bool writes = false;
  bool dry_run = false;
  bool json = false;
  std::filesystem::path json_file;
};

struct Search {
  std::vector<Cell> cells;
  std::vector<Series> series;
};

// On a terminal the table is drawn anew after each round, else there is a line.
void show(const char* what, const std::vector<Cell>& cells, double spent_s, double budget_s, bool first) {
  static std::size_t lines = 0;
  const Cell& best = choose(cells);
  if (::isatty(STDERR_FILENO) != 0) {
    if (!first && lines > 0) std::fprintf(stderr, "\033[%zuF\033[J", lines);
    for (const Cell& cell : cells) {
      std::fprintf(stderr, "%c %-44s %7.2f GB/s %5.0f ms CPU/GB %3d samples\n", &cell == &best ? '*' : ' ',
                   text_of(cell.setting).c_str(), cell.gb_per_s, cell.cpu_s_per_gb * 1e3, cell.samples);
    }
    lines = cells.size() + 1;
  }
  std::fprintf(stderr, "%s: %.0f s of %.0f s, best %s %.2f GB/s, default %.2f GB/s\n", what, spent_s, budget_s,
               text_of(best.setting).c_str(), best.gb_per_s, cells.front().gb_per_s);
}

void add_sample(Search& search, Subject& subject, const Setting& setting, Work work) {
  auto found =
      std::find_if(search.cells.begin(), search.cells.end(), [&](const Cell& cell) { return cell.setting == setting; });
  if (found == search.cells.end()) {
    found = search.cells.insert(search.cells.end(), {.setting = setting});
    search.series.emplace_back(subject.sample_bytes(work));
  }
  Series& series = search.series[static_cast<std::size_t>(found - search.cells.begin())];
  series.add(sample(subject, setting, work));
  ++found->samples;
  found->gb_per_s = series.gb_per_s();
  found->cpu_s_per_gb = series.cpu_s_per_gb();
}

// Measures rounds, the first one of `round`, until another would not change the choice or the time is over.
std::vector<Cell> search(Subject& subject, std::vector<Setting> round, const Neighbours& neighbours, Work work,
                         Clock::time_point begin, double until_s, double budget_s) {
  Search result;
  // std::random_device would need a newer glibc than the wheels.
  std::mt19937 random(static_cast<std::mt19937::result_type>(begin.time_since_epoch().count()));
  const std::array<const char*, 3> names{"disk", "page cache", "writes"};
  const auto spent_s = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
  for (bool first = true; !round.empty(); first = false, round = next_round(result.cells, neighbours)) {
    // The default stays in front, because it is what others are compared with.
    std::shuffle(round.begin() + 1, round.end(), random);
    for (const Setting& setting : round) {
      if (!result.cells.empty() && spent_s() > until_s) break;
      add_sample(result, subject, setting, work);
    }
    show(names[static_cast<std::size_t>(work)], result.cells, spent_s(), budget_s, first);
    if (spent_s() > until_s) break;
  }
  return std::move(result.cells);
}

// The speeds of the pick relative to the default, from pairs of samples in turns.
std::vector<double> ratios_of(Subject& subject, const Setting& pick, Work work, Clock::time_point end) {
  constexpr int kLeast = 7;
  constexpr int kMost = 15;
  std::vector<double> ratios;
  for (int pair = 0; pair < kMost && (pair < kLeast || Clock::now() < end); ++pair) {
    std::array<double, 2> seconds{};
    for (const int turn : {pair % 2, 1 - pair % 2}) {
      seconds[static_cast<std::size_t>(turn)] = sample(subject, turn == 0 ? kUsual : pick, work).seconds;
    }
    ratios.push_back(seconds[0] / seconds[1]);
  }
  return ratios;
}

constexpr int kMostGib = 1 << 20;

Clock::time_point later(Clock::time_point time, double seconds) {
  return time + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

unsigned cores() { return std::thread::hardware_concurrency(); }

// Times the requests of the settings, the pick and the default first, until the time is over. They are timed without
// the engine, by the least code that has as many of the same size in flight, because clocks would cost the engine's
// driver.
std::string add_latencies(std::vector<Cell>& cells, Subject& subject, Clock::time_point end) {
  const Setting pick = choose(cells).setting;
  std::vector<Cell*> order;
  for (Cell& cell : cells) order.push_back(&cell);
  std::stable_sort(order.begin(), order.end(), [](const Cell* a, const Cell* b) { return a->gb_per_s > b->gb_per_s; });
  std::stable_partition(order.begin(), order.end(),
                        [&](const Cell* cell) { return cell == &cells.front() || cell->setting == pick; });
  try {
    const OpenFile file(subject.checkpoint.path(), O_RDONLY | O_DIRECT);
    const auto memory = subject.memory.bytes().first(subject.sample_bytes(Work::kDisk));
    for (Cell* const cell : order) {
      const Setting& setting = cell->setting;
      cell->latency = latency_of(time_reads(pieces_of(file, memory, setting.chunk_bytes), setting.queue_depth));
      if (Clock::now() > end) break;
    }
  } catch (const std::system_error& error) {
    return error.what();  // As where io_uring is refused.
  }
  return {};
}

// The settings to measure in turns with the default: the pick; the best one that keeps chunk and depth of the disk's;
// what the disk alone asked for, because workers or slots may be to blame if those before are no better.
std::vector<Setting> candidates_of(const Report& report, const Setting& of_the_disk) {
  std::vector<Cell> cells = report.page_cache.cells;
  const auto other = [&](const Cell& cell) {
    return cell.setting.chunk_bytes != of_the_disk.chunk_bytes || cell.setting.queue_depth != of_the_disk.queue_depth;
  };
  cells.erase(std::remove_if(cells.begin() + 1, cells.end(), other), cells.end());
  std::vector<Setting> candidates;
  for (const Setting& each : {report.pick, choose(cells).setting, of_the_disk}) {
    if (each != kUsual && std::find(candidates.begin(), candidates.end(), each) == candidates.end())
      candidates.push_back(each);
  }
  return candidates;
}

// Measures candidates in turns with the default, until one of them is better. The first two get their turns however
// little time is left.
void decide(Report& report, Subject& subject, const Setting& of_the_disk, Clock::time_point end) {
  const std::vector<Setting> candidates = candidates_of(report, of_the_disk);
  for (std::size_t i = 0; i < candidates.size() && report.kept_default; ++i) {
    if (i > 1 && Clock::now() > end) break;
    const auto share = (end - Clock::now()) / static_cast<int>(2 * (candidates.size() - i));
    report.pick = candidates[i];
    std::vector<std::vector<double>> ratios;
    if (!report.disk.cells.empty())
      ratios.push_back(ratios_of(subject, report.pick, Work::kDisk, Clock::now() + share));
    ratios.push_back(ratios_of(subject, report.pick, Work::kPageCache, Clock::now() + share));
    report.gains.clear();
    for (const std::vector<double>& pairs : ratios) report.gains.push_back(median(pairs) - 1);
    report.kept_default = !is_better(std::move(ratios));
  }
}

// The shares of the budget at whose ends the parts of the work end.
struct Shares {
  double disk;
  double latencies;
  double page_cache;
};

void measure_disk(Report& report, Subject& subject, Clock::time_point begin, const Shares& ends, double budget_s) {
  fit(subject, Work::kDisk, budget_s / 100);
  report.read_bytes = subject.sample_bytes(Work::kDisk);
  report.disk.cells =
      search(subject, coarse_settings(kUsual), beside_on_disk, Work::kDisk, begin, budget_s * ends.disk, budget_s);
  report.pick = choose(report.disk.cells).setting;
  report.disk.limit = limit_of(choose(report.disk.cells), "disk", {.link = report.link_gb_per_s, .cores = cores()});
  report.no_latency = add_latencies(report.disk.cells, subject, later(begin, budget_s * ends.latencies));
}

void measure_page_cache(Report& report, Subject& subject, Clock::time_point begin, double until_s, double budget_s) {
  const Setting usual = report.pick;
  warm_page_cache(subject.checkpoint.path());
  fit(subject, Work::kPageCache, budget_s / 100);
  if (report.disk.cells.empty()) report.read_bytes = subject.sample_bytes(Work::kPageCache);
  if (subject.device_memory) {
    const SlotGrid grid(usual, options_of(usual, subject.device).staging_bytes, subject.usual_workers, cores());
    report.page_cache.cells = search(
        subject, grid.coarse(), [&](const Setting& of) { return grid.beside(of); }, Work::kPageCache, begin, until_s,
        budget_s);
  } else {
    report.page_cache.cells =
        search(subject, worker_settings(usual, cores()), nullptr, Work::kPageCache, begin, until_s, budget_s);
  }
  report.pick = choose(report.page_cache.cells).setting;
  // Bytes for a GPU do not leave the CPU's cache on their way to slots, so that copies to memory are no limit for them.
  const double copies = subject.device_memory ? 0 : copies_gb_per_s(subject);
  report.page_cache.limit = limit_of(choose(report.page_cache.cells), "workers and memory",
                                     {.link = report.link_gb_per_s, .copies = copies, .cores = cores()});
}

Report tune(Subject& subject, const Flags& flags) {
  // A GPU has more to measure from the page cache.
  const Shares ends = subject.device_memory ? Shares{0.4, 0.45, 0.8} : Shares{0.55, 0.63, 0.8};
  Report report{.directory = flags.path, .device = flags.device};
  const bool disk = try_drop_from_page_cache(subject.checkpoint.path());
  const auto begin = Clock::now();
  // Writes take what is left of the budget.
  const double budget_s = flags.budget_s * (disk && flags.writes ? 0.7 : 1);
  if (subject.device_memory) report.link_gb_per_s = link_gb_per_s(*subject.device_memory, subject.memory.bytes());
  if (disk) measure_disk(report, subject, begin, ends, budget_s);
  const Setting of_the_disk = report.pick;
  measure_page_cache(report, subject, begin, budget_s * ends.page_cache, budget_s);
  decide(report, subject, of_the_disk, later(begin, budget_s));
  report.verified_bytes = subject.verified_bytes;
  if (disk && flags.writes) {
    report.writes.cells =
        search(subject, coarse_settings(kUsual), beside_on_disk, Work::kWrites, begin, flags.budget_s, flags.budget_s);
    report.writes.limit = limit_of(choose(report.writes.cells), "disk", {.cores = cores()});
  }
  report.fallback_reason = subject.fallback_reason;
  check_bytes(subject, report.kept_default ? kUsual : report.pick);
  return report;
}

void keep(Report& report, const Flags& flags) {
  report.not_kept = "--dry_run";
  if (flags.dry_run) return;
  try {
    keep_profile(flags.path, options_of(report.kept_default ? kUsual : report.pick, flags.device));
    report.kept = profiles_path();
    report.not_kept.clear();
  } catch (const Error& error) {
    report.not_kept = error.what();
  }
}

void write_file(const std::filesystem::path& path, const std::string& text) {
  std::ofstream out(path);
  if (!(out << text << "\n").flush()) throw std::system_error(errno, std::generic_category(), "write " + path.string());
}

std::array<std::string, 2> files_to_remove;

// Removes the files that the program makes beside PATH also when a signal ends it, which runs no destructor.
void remove_when_ended(const std::filesystem::path& generated) {
  files_to_remove = {generated.native(), generated.native() + ".written"};
  struct sigaction action{};
  action.sa_handler = [](int signal) {
    for (const std::string& file : files_to_remove) ::unlink(file.c_str());
    ::raise(signal);  // It ends the program once this returns.
  };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) ::sigaction(signal, &action, nullptr);
}

int run(Flags flags) {
  if (!std::filesystem::is_directory(flags.path)) {
    if (!std::filesystem::exists(flags.path))
      throw Error(std::make_error_code(std::errc::no_such_file_or_directory), flags.path.string(), flags.path);
    flags.path = std::filesystem::absolute(flags.path).parent_path();
  }
  const auto size_bytes = static_cast<std::uint64_t>(flags.size_gib * (1 << 30));
  const std::string name = "flashpack_tune." + std::to_string(::getpid()) + ".flashpack";
  if (flags.device.kind == Device::Kind::kCuda) require_cuda_device(flags.device.index);
  remove_when_ended(flags.path / name);
  Subject subject(flags.path / name, size_bytes, flags.device, flags.verify);
  Report report = tune(subject, flags);
  keep(report, flags);
  if (!flags.json_file.empty()) write_file(flags.json_file, json_of(report));
  flags.json ? static_cast<void>(std::printf("%s\n", json_of(report).c_str())) : print_text(report);
  return flags.dry_run || !report.kept.empty() ? 0 : kExitNotKept;
}

// Throws: CLI::ValidationError.
Device device_of(const std::string& name) {
  if (name == "cpu") return {};
  constexpr std::string_view kCuda = "cuda";
  const std::string_view number = std::string_view(name).substr(std::min(name.size(), kCuda.size()));
  int index = 0;
  if (name.starts_with(kCuda) && number.empty()) return {Device::Kind::kCuda, 0};
  const auto [end, error] =
      std::from_chars(number.data() + std::min<std::size_t>(1, number.size()), number.data() + number.size(), index);
  const bool whole = error == std::errc() && end == number.data() + number.size();
  if (!name.starts_with(kCuda) || !number.starts_with(':') || !whole || index < 0)
    throw CLI::ValidationError("--device", "\"" + name + "\" is no device like cpu, cuda or cuda:1");
  return {Device::Kind::kCuda, index};
}

constexpr const char* kDescription =
    "Measures how this machine reads a disk with chunks, queue depths, workers and, for a GPU, staging memory of "
    "various\n"
    "sizes, and keeps what is best in $XDG_CONFIG_HOME/flashpack/tune.json, else ~/.config/flashpack/tune.json, where\n"
    "tuned_options() finds it.";

constexpr const char* kFooter =
    "The number of streams that copy to a GPU is no option of the engine, which has two, and so is not searched.\n"
    "\n"
    "Exit status: 0 it was measured, and kept unless --dry_run; 1 it failed; 2 wrong usage; 3 it was measured, but no\n"
    "profile could be kept: on tmpfs, where nothing can be recognised another time, or without a place to write.";

}  // namespace
}  // namespace flashpack::bench

int main(int argc, char** argv) try {
  using namespace flashpack::bench;
  Flags flags;
  std::string device = "cpu";
  CLI::App app(kDescription, "flashpack_tune");
  app.footer(kFooter);
  app.add_option("PATH", flags.path, "A directory on the disk to tune for, or a file in it")->capture_default_str();
  app.add_option("--device", device,
                 "Where loads go: cpu, cuda or cuda:1; the GPU models of a machine have a profile of their own")
      ->capture_default_str();
  app.add_option("--budget", flags.budget_s, "Time to measure, as 60 or 60s; to write the file comes on top")
      ->transform(CLI::AsNumberWithUnit(std::map<std::string, double>{{"s", 1}, {"min", 60}}))
      ->capture_default_str();
  app.add_option("--size_gib", flags.size_gib, "Size of the generated file, which is removed in the end")
      ->capture_default_str();
  app.add_flag("--verify", flags.verify, "Loads compare checksums, as those from Python do by default");
  app.add_flag("--writes", flags.writes, "Measure durable writes, too, in a third of the time; they are only shown");
  app.add_flag("--dry_run", flags.dry_run, "Keep no profile");
  app.add_flag("--json", flags.json, "Print one object");
  app.add_option("--json_file", flags.json_file, "Write the same object to a file, too");
  try {
    app.parse(argc, argv);
    // Neither comparison holds for a NaN.
    if (!(flags.budget_s > 0)) throw CLI::ValidationError("--budget", "must be more than 0");
    if (!(flags.size_gib > 0 && flags.size_gib <= kMostGib))
      throw CLI::ValidationError("--size_gib", "must be more than 0 and at most " + std::to_string(kMostGib));
    flags.device = device_of(device);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitUsage;
  }
  return run(std::move(flags));
} catch (const std::exception& error) {
  std::fprintf(stderr, "flashpack_tune: %s\n", error.what());
  return flashpack::bench::kExitFailed;
}
