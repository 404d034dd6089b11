// Finds the chunk size, queue depth and number of workers with which this machine reads a disk fastest, and keeps them.
//
// The disk is searched first, from settings that lie far apart to what lies beside the fastest; then, from the page
// cache, the number of workers, and for a GPU the chunk size and staging memory, too. In the end the setting that was
// found and the default are measured in turns, because the fastest of many noisy measurements is often so by chance.
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "bench/support/device_memory.h"
#include "bench/support/open_file.h"
#include "bench/support/page_cache.h"
#include "bench/support/roofline.h"
#include "engine/ground/cpu_quota.h"
#include "engine/tuning/keep_profile.h"
#include "engine/tuning/profile_key.h"
#include "flashpack/engine.h"
#include "flashpack/tuning.h"
#include "tools/tune/budget.h"
#include "tools/tune/choice.h"
#include "tools/tune/decide.h"
#include "tools/tune/grid.h"
#include "tools/tune/limit.h"
#include "tools/tune/plain_io.h"
#include "tools/tune/report.h"
#include "tools/tune/search.h"
#include "tools/tune/subject.h"

namespace flashpack::bench {
namespace {

constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;
constexpr int kExitNotKept = 3;

using Clock = Budget::Clock;

struct Flags {
  std::filesystem::path path = ".";
  Device device;
  double budget_s = 60;
  double size_gib = 1;
  bool verify = false;
  bool writes = false;
  bool backend = false;
  bool policy = false;
  bool dry_run = false;
  bool json = false;
  std::filesystem::path json_file;
};

constexpr int kMostGib = 1 << 20;
constexpr double kMostBudgetS = 24 * 60 * 60;

unsigned cores() { return std::thread::hardware_concurrency(); }

// The number that may be busy, of those that the engine's threads run on.
double allowed_cores() { return std::min<double>(cores(), internal::cpu_quota().value_or(cores())); }

// Times the requests of the settings, those of the pick and the default in any case, until the time is over. They are
// timed without the engine, by the least code that has as many of the same size in flight in io_uring, because to
// take the time of each request would slow the engine's driver.
std::string add_latencies(std::vector<Cell>& cells, Subject& subject, Clock::time_point end) {
  const Setting pick = choose(cells).setting;
  std::vector<Cell*> order;
  for (Cell& cell : cells) {
    if (cell.setting.backend == kUsual.backend) order.push_back(&cell);
  }
  std::stable_sort(order.begin(), order.end(), [](const Cell* a, const Cell* b) { return a->gb_per_s > b->gb_per_s; });
  std::stable_partition(order.begin(), order.end(),
                        [&](const Cell* cell) { return cell == &cells.front() || cell->setting == pick; });
  try {
    const OpenFile file(subject.checkpoint.path(), O_RDONLY | O_DIRECT);
    const auto memory = subject.memory.bytes().first(subject.sample_bytes(Work::kDisk));
    for (Cell* const cell : order) {
      const Setting& setting = cell->setting;
      cell->latency = latency_of(time_reads(pieces_of(file, memory, setting.chunk_bytes), setting.queue_depth));
      if (cell != order.front() && Clock::now() > end) break;
    }
  } catch (const std::system_error& error) {
    return error.what();  // As where io_uring is refused.
  }
  return {};
}

// The shares of the budget at whose ends the parts of the work end.
struct Shares {
  double disk;
  double latencies;
  double page_cache;
};

// The reason why the workers carry out all reads, so that there is nothing to compare io_uring with; empty if they do
// not.
std::string why_workers_alone(const Device& device) {
  const Engine engine(options_of(kUsual, device));
  if (engine.options().backend != Backend::kWorkers) return {};
  return "only the workers are there: " + engine.fallback_reason();
}

void set_limit_of_disk(Report& report, const Subject& subject, Clock::time_point end) {
  const Cell& best = choose(report.disk.cells);
  try {
    report.disk.plain_gb_per_s = plain_reads_gb_per_s(subject, best.setting, end);
  } catch (const std::system_error&) {  // It is told with the latencies, which meet the same.
  }
  report.disk.limit =
      limit_of(best, "not known, because plain reads could not be measured",
               {.link = report.link_gb_per_s, .disk = report.disk.plain_gb_per_s, .cores = allowed_cores()});
}

void measure_disk(Report& report, Subject& subject, const Budget& budget, const Shares& ends, bool backends) {
  fit(subject, Work::kDisk, budget.seconds / 100);
  report.read_bytes = subject.sample_bytes(Work::kDisk);
  const std::string workers_alone = why_workers_alone(subject.device);
  if (backends) report.no_backend = workers_alone;
  std::vector<Setting> round = coarse_settings(kUsual);
  Neighbours beside = beside_on_disk;
  if (!workers_alone.empty()) {
    round = coarse_settings_of_workers(kUsual, subject.usual_workers);
    beside = [&](const Setting& of) { return beside_by_workers(of, kUsual, subject.usual_workers); };
  } else if (backends) {
    round = coarse_settings_of_backends(kUsual);
    beside = [&](const Setting& of) { return beside_with_backends(of, kUsual, subject.usual_workers); };
  }
  report.disk.cells = search(subject, round, beside, Work::kDisk, budget, ends.disk);
  report.pick = choose(report.disk.cells).setting;
  set_limit_of_disk(report, subject, budget.end_of((ends.disk + ends.latencies) / 2));
  report.no_latency = add_latencies(report.disk.cells, subject, budget.end_of(ends.latencies));
}

// Empty if the file is in the page cache then.
std::string why_not_in_page_cache(const std::filesystem::path& file) {
  if (!can_stay_in_page_cache(file)) return "the file system keeps nothing there";
  try {
    warm_page_cache(file);
  } catch (const PageCacheError& error) {
    return error.what();
  }
  return {};
}

void measure_page_cache(Report& report, Subject& subject, const Budget& budget, double share) {
  const Setting usual = report.pick;
  report.no_page_cache = why_not_in_page_cache(subject.checkpoint.path());
  if (!report.no_page_cache.empty()) {
    if (report.disk.cells.empty()) throw PageCacheError(report.no_page_cache);  // Nothing could be measured.
    return;
  }
  fit(subject, Work::kPageCache, budget.seconds / 100);
  if (report.disk.cells.empty()) report.read_bytes = subject.sample_bytes(Work::kPageCache);
  if (subject.device_memory) {
    const SlotGrid grid(usual, options_of(usual, subject.device).staging_bytes, subject.usual_workers, cores());
    report.page_cache.cells = search(
        subject, grid.coarse(), [&](const Setting& of) { return grid.beside(of); }, Work::kPageCache, budget, share);
  } else {
    report.page_cache.cells = search(subject, worker_settings(usual, cores(), subject.usual_workers), nullptr,
                                     Work::kPageCache, budget, share);
  }
  report.pick = choose(report.page_cache.cells).setting;
  // Bytes for a GPU do not leave the CPU's cache on their way to slots, so that copies to memory are no limit for them.
  const double copies = subject.device_memory ? 0 : copies_gb_per_s(subject);
  report.page_cache.limit = limit_of(choose(report.page_cache.cells), "workers and memory",
                                     {.link = report.link_gb_per_s, .copies = copies, .cores = allowed_cores()});
}

// Measures what is only shown, and returns why that failed, which must not cost what was decided before.
std::string attempt(const std::function<void()>& measure) {
  try {
    measure();
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

void measure_policies(Report& report, Subject& subject, const Budget& budget) {
  const auto measured = [&](std::vector<PolicyCell>& cells, Cached cached, Clock::time_point end) {
    return attempt([&] { cells = bench::measure_policies(subject, setting_of(report), cached, end); });
  };
  if (!report.page_cache.cells.empty()) report.no_cached = measured(report.cached, Cached::kWhole, budget.end_of(0.5));
  report.no_cold = measured(report.cold, Cached::kNothing, budget.end_of());
}

void measure_writes(Report& report, Subject& subject, const Budget& budget) {
  report.no_writes = attempt([&] {
    report.writes.cells = search(subject, coarse_settings(kUsual), beside_on_disk, Work::kWrites, budget, 0.9);
    attempt(  // It fails where io_uring is refused.
        [&] { report.writes.plain_gb_per_s = plain_writes_gb_per_s(subject, budget.end_of()); });
    report.writes.limit = limit_of(choose(report.writes.cells), "not known, because plain writes could not be measured",
                                   {.disk = report.writes.plain_gb_per_s, .plain = "writes", .cores = allowed_cores()});
  });
}

Report tune(Subject& subject, const Flags& flags) {
  // A GPU has more to measure from the page cache.
  const Shares ends = subject.device_memory ? Shares{0.4, 0.45, 0.8} : Shares{0.55, 0.63, 0.8};
  Report report{.directory = flags.path, .device = flags.device};
  const internal::ProfileKey key = internal::profile_key(flags.path, flags.device);
  if (key.on_network) report.server = key.storage;
  const bool disk = try_drop_from_page_cache(subject.checkpoint.path());
  const Budget all{Clock::now(), flags.budget_s};
  // Policies and writes have their time even if a setting that gains was measured for longer than its share.
  const double for_policies = disk && flags.policy ? 0.15 : 0;
  const double for_writes = disk && flags.writes ? 0.3 : 0;
  const Budget budget{all.begin, all.seconds * (1 - for_writes - for_policies)};
  if (subject.device_memory) report.link_gb_per_s = link_gb_per_s(*subject.device_memory, subject.memory.bytes());
  if (disk) measure_disk(report, subject, budget, ends, flags.backend);
  const Setting of_the_disk = report.pick;
  measure_page_cache(report, subject, budget, ends.page_cache);
  decide(report, subject, of_the_disk, budget.end_of());
  report.verified_bytes = subject.verified_bytes;
  if (disk && flags.policy) measure_policies(report, subject, {Clock::now(), for_policies * all.seconds});
  if (disk && flags.writes) measure_writes(report, subject, {Clock::now(), for_writes * all.seconds});
  report.fallback_reason = subject.fallback_reason;
  check_bytes(subject, setting_of(report));
  return report;
}

void keep(Report& report, const Flags& flags) {
  report.not_kept = "--dry_run";
  if (flags.dry_run) return;
  try {
    internal::keep_profile(flags.path, options_of(setting_of(report), flags.device));
    report.kept = profiles_path();
    report.not_kept.clear();
  } catch (const Error& error) {
    report.not_kept = error.what();
  }
}

// Tells before the measurement, which takes a minute, that no profile will be kept. The measurement is made all the
// same, because somebody may want its figures.
void tell_if_none_is_kept(const Flags& flags) {
  const std::string why = flags.dry_run ? "" : internal::why_none_is_kept(flags.path, flags.device);
  if (!why.empty()) std::fprintf(stderr, "flashpack_tune: no profile will be kept: %s\n", why.c_str());
}

using Output = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

[[noreturn]] void fail_to_write(const std::string& path) {
  throw std::system_error(errno, std::generic_category(), "write " + path);
}

// Opened before anything is measured, so that a wrong path costs no minute.
Output open_to_write(const std::string& path) {
  Output file(path.empty() ? nullptr : std::fopen(path.c_str(), "we"), std::fclose);
  if (!file && !path.empty()) fail_to_write(path);
  return file;
}

// Removes all files in the directory of `generated` that have its name in theirs. While a file is written, its name has
// a dot before and random text behind.
void remove_files(const std::filesystem::path& generated) {
  for (bool found = true; found;) {  // The program may make one more meanwhile.
    found = false;
    std::error_code error;
    std::filesystem::directory_iterator entry(generated.parent_path(), error);
    for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
      const std::string name = entry->path().filename();
      if (name.find(generated.filename()) != std::string::npos) found |= ::unlink(entry->path().c_str()) == 0;
    }
  }
}

// Removes the generated files also when a signal ends the program, which runs no destructor.
void remove_when_ended(const std::filesystem::path& generated) {
  ::signal(SIGPIPE, SIG_IGN);  // A reader of the output that ends early is no reason to end.
  sigset_t ends;
  ::sigemptyset(&ends);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT}) {
    struct sigaction action{};
    const bool ignored = ::sigaction(signal, nullptr, &action) == 0 && action.sa_handler == SIG_IGN;
    if (!ignored) ::sigaddset(&ends, signal);
  }
  ::pthread_sigmask(SIG_BLOCK, &ends, nullptr);  // Threads that are started later inherit it.
  std::thread([ends, generated] {
    int signal = 0;
    while (::sigwait(&ends, &signal) != 0) continue;
    remove_files(generated);
    ::pthread_sigmask(SIG_UNBLOCK, &ends, nullptr);
    ::raise(signal);
    ::_exit(128 + signal);  // The first process of a container is not ended by the signal.
  }).detach();
}

int run(Flags flags) {
  if (!std::filesystem::is_directory(flags.path)) {
    if (!std::filesystem::exists(flags.path))
      throw Error(std::make_error_code(std::errc::no_such_file_or_directory), flags.path.string(), flags.path);
    flags.path = std::filesystem::absolute(flags.path).parent_path();
  }
  const auto size_bytes = static_cast<std::uint64_t>(flags.size_gib * (1 << 30));
  const std::string name = unique_name("flashpack_tune");
  remove_when_ended(flags.path / name);  // Before anything that may start a thread.
  if (flags.device.kind == Device::Kind::kCuda) require_cuda_device(flags.device.index);
  const Output json_file = open_to_write(flags.json_file);
  tell_if_none_is_kept(flags);
  Subject subject(flags.path / name, size_bytes, flags.device, flags.verify);
  Report report = tune(subject, flags);
  keep(report, flags);
  if (json_file &&
      (std::fprintf(json_file.get(), "%s\n", json_of(report).c_str()) < 0 || std::fflush(json_file.get()) != 0))
    fail_to_write(flags.json_file);
  flags.json ? static_cast<void>(std::printf("%s\n", json_of(report).c_str())) : print_text(report);
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) fail_to_write("the standard output");
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

// CLI11 would take what follows an empty value for the value. Throws: CLI::ValidationError.
void check_values(std::span<char* const> arguments) {
  for (const std::string_view argument : arguments) {
    if (argument == "--") return;
    if (argument.starts_with("--") && argument.ends_with("="))
      throw CLI::ValidationError(std::string(argument.substr(0, argument.size() - 1)), "has an empty value");
  }
}

constexpr const char* kDescription =
    "Measures how this machine reads a disk with chunks, queue depths, workers and, for a GPU, staging memory of "
    "various\n"
    "sizes, and keeps what is best in $XDG_CONFIG_HOME/flashpack/tune.json, else ~/.config/flashpack/tune.json, where\n"
    "tuned_options() finds it.";

constexpr const char* kFooter =
    "A backend that was faster is kept. A cache policy is not, because each load has its own.\n"
    "\n"
    "The number of streams that copy to a GPU is no option of the engine, which has two, and so is not searched.\n"
    "\n"
    "Loads from Python use what is kept from then on, C++ and C programs ask for it; FLASHPACK_TUNE=off turns that "
    "off.\n"
    "\n"
    "Exit status: 0 it was measured, and kept unless --dry_run; 1 it failed; 2 wrong usage; 3 it was measured, but no\n"
    "profile could be kept, which is said before: where no disk or server can be recognised another time, as on "
    "tmpfs,\n"
    "the overlay that a container has as its root, ZFS and most of FUSE, or without a place to write.";

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
  app.add_option("--budget", flags.budget_s, "Time to measure, as 60 or 60s; writing and proving a gain add to it")
      ->transform(CLI::AsNumberWithUnit(std::map<std::string, double>{{"s", 1}, {"min", 60}}))
      ->capture_default_str();
  app.add_option("--size_gib", flags.size_gib, "Size of the generated file, which is removed in the end")
      ->capture_default_str();
  app.add_flag("--verify", flags.verify, "Loads compare checksums, as those from Python do by default");
  app.add_flag("--writes", flags.writes, "Measure durable writes, too, in a third of the time; they are only shown");
  app.add_flag("--backend", flags.backend,
               "Search reads by the workers beside those by io_uring, too, and keep the faster");
  app.add_flag("--policy", flags.policy, "Compare past and through the page cache, too; policies are only shown");
  app.add_flag("--dry_run", flags.dry_run, "Keep no profile");
  app.add_flag("--json", flags.json, "Print one object");
  app.add_option("--json_file", flags.json_file, "Write the same object to a file, too");
  try {
    check_values({argv + 1, argv + argc});
    app.parse(argc, argv);
    // Neither comparison holds for a NaN.
    if (!(flags.budget_s > 0 && flags.budget_s <= kMostBudgetS))
      throw CLI::ValidationError("--budget", "must be more than 0 s and at most a day");
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
