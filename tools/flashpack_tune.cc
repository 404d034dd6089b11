// Finds the chunk size, queue depth and number of workers with which this machine reads a disk fastest, and keeps them.
//
// The disk is searched first, from settings that lie far apart to what lies beside the fastest; then, from the page
// cache, the number of workers. In the end the setting that was found and the default are measured in turns, because
// the fastest of many noisy measurements is often so by chance.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <boost/json/array.hpp>
#include <boost/json/object.hpp>
#include <boost/json/serialize.hpp>
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bench/support/checkpoint.h"
#include "bench/support/measure.h"
#include "bench/support/page_cache.h"
#include "bench/support/roofline.h"
#include "bench/support/tuning.h"
#include "engine/ground/host_region.h"
#include "flashpack/engine.h"
#include "flashpack/tuning.h"

namespace flashpack::bench {
namespace {

constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;
constexpr int kExitNotKept = 3;
constexpr Setting kUsual{EngineOptions().chunk_bytes, EngineOptions().queue_depth, EngineOptions().workers};

using Clock = std::chrono::steady_clock;

struct Flags {
  std::filesystem::path path = ".";
  double budget_s = 60;
  double size_gib = 1;
  bool dry_run = false;
  bool json = false;
};

EngineOptions options_of(const Setting& setting) {
  EngineOptions options;
  options.chunk_bytes = setting.chunk_bytes;
  options.queue_depth = setting.queue_depth;
  options.workers = setting.workers;
  // Staging is large enough never to limit the reads in flight.
  const std::uint64_t in_flight_bytes = std::uint64_t{setting.chunk_bytes} * setting.queue_depth;
  options.staging_bytes = std::max({std::uint64_t{64} << 20, in_flight_bytes, std::uint64_t{2} * options.chunk_bytes});
  return options;
}

std::string text_of(const Setting& setting) {
  const std::string workers = setting.workers == 0 ? "default" : std::to_string(setting.workers);
  return std::to_string(setting.chunk_bytes >> 20) + " MiB x " + std::to_string(setting.queue_depth) + ", " + workers +
         " workers";
}

/// The file that is read, and memory for all of it, which is touched.
struct Subject {
  Subject(const std::filesystem::path& file, std::uint64_t size_bytes)
      : checkpoint(file, size_bytes, false), memory(checkpoint.metadata().payload_bytes + 4096, "tensors") {
    touch(memory.bytes());
    whole = checkpoint.request(memory.data());
  }
  Checkpoint checkpoint;
  internal::HostRegion memory;
  LoadRequest whole;
  std::string fallback_reason;
};

std::uint64_t size_of(const LoadRequest& request) {
  std::uint64_t bytes = 0;
  for (const Extent& extent : request.files.front().extents) bytes += extent.size_bytes;
  return bytes;
}

Sample sample(Subject& subject, const Setting& setting, CachePolicy cache) {
  Engine engine(options_of(setting));
  LoadRequest request = subject.whole;
  request.cache = cache;
  // The engine takes its staging memory at its first load, which is not to be measured.
  LoadRequest first_tensor = request;
  first_tensor.files.front().extents.resize(1);
  engine.load(first_tensor);
  return measure([&] { subject.fallback_reason = engine.load(request).fallback_reason; });
}

// Leaves so much of the file to read that one read takes `seconds` on a slow disk.
void fit(Subject& subject, CachePolicy cache, double seconds) {
  auto& extents = subject.whole.files.front().extents;
  while (extents.size() > 1 && sample(subject, kUsual, cache).seconds > seconds) {
    const std::uint64_t wanted = size_of(subject.whole) / 2;
    while (extents.size() > 1 && size_of(subject.whole) > wanted) extents.pop_back();
  }
}

struct Search {
  std::vector<Cell> cells;
  std::vector<Series> series;
};

// On a terminal the table is drawn anew after each round, else there is a line.
void show(const char* what, const Search& search, double spent_s, double budget_s, bool first) {
  static std::size_t lines = 0;
  const Cell& best = choose(search.cells);
  if (::isatty(STDERR_FILENO) != 0) {
    if (!first && lines > 0) std::fprintf(stderr, "\033[%zuF\033[J", lines);
    for (const Cell& cell : search.cells) {
      std::fprintf(stderr, "%c %-34s %7.2f GB/s %5.0f ms CPU/GB %3d samples\n", &cell == &best ? '*' : ' ',
                   text_of(cell.setting).c_str(), cell.gb_per_s, cell.cpu_s_per_gb * 1e3, cell.samples);
    }
    lines = search.cells.size() + 1;
  }
  std::fprintf(stderr, "%s: %.0f s of %.0f s, best %s %.2f GB/s, default %.2f GB/s\n", what, spent_s, budget_s,
               text_of(best.setting).c_str(), best.gb_per_s, search.cells.front().gb_per_s);
}

void add_sample(Search& search, Subject& subject, const Setting& setting, CachePolicy cache) {
  auto found =
      std::find_if(search.cells.begin(), search.cells.end(), [&](const Cell& cell) { return cell.setting == setting; });
  if (found == search.cells.end()) {
    found = search.cells.insert(search.cells.end(), {.setting = setting});
    search.series.emplace_back(size_of(subject.whole));
  }
  Series& series = search.series[static_cast<std::size_t>(found - search.cells.begin())];
  series.add(sample(subject, setting, cache));
  *found = {setting, found->samples + 1, series.gb_per_s(), series.cpu_s_per_gb()};
}

// Measures rounds, the first one of `round`, until another would not change the choice or the time is over.
Search search(Subject& subject, std::vector<Setting> round, CachePolicy cache, Clock::time_point begin, double until_s,
              double budget_s) {
  Search result;
  // std::random_device would need a newer glibc than the wheels.
  std::mt19937 random(static_cast<std::mt19937::result_type>(begin.time_since_epoch().count()));
  const bool refine = cache == CachePolicy::kDirect;
  const auto spent_s = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
  for (bool first = true; !round.empty(); first = false, round = next_round(result.cells, refine)) {
    // The default stays in front, because it is what others are compared with.
    std::shuffle(round.begin() + 1, round.end(), random);
    for (const Setting& setting : round) {
      if (!result.cells.empty() && spent_s() > until_s) break;
      add_sample(result, subject, setting, cache);
    }
    show(refine ? "disk" : "page cache", result, spent_s(), budget_s, first);
    if (spent_s() > until_s) break;
  }
  return result;
}

// The speeds of the pick relative to the default, from pairs of samples in turns.
std::vector<double> ratios_of(Subject& subject, const Setting& pick, CachePolicy cache, Clock::time_point end) {
  constexpr int kLeast = 7;
  constexpr int kMost = 15;
  std::vector<double> ratios;
  for (int pair = 0; pair < kMost && (pair < kLeast || Clock::now() < end); ++pair) {
    std::array<double, 2> seconds{};
    for (const int turn : {pair % 2, 1 - pair % 2}) {
      seconds[static_cast<std::size_t>(turn)] = sample(subject, turn == 0 ? kUsual : pick, cache).seconds;
    }
    ratios.push_back(seconds[0] / seconds[1]);
  }
  return ratios;
}

// Says what kept a search from being faster.
std::string limit_of(const Search& search, bool from_disk, double copies_gb_per_s) {
  const Cell& best = choose(search.cells);
  const double cores = std::thread::hardware_concurrency();
  char text[160];
  const double busy = best.cpu_s_per_gb * best.gb_per_s;
  if (!from_disk && best.gb_per_s > 0.85 * copies_gb_per_s) {
    std::snprintf(text, sizeof text, "memory: plain copies by all cores reach %.1f GB/s", copies_gb_per_s);
  } else if (busy > 0.8 * cores) {
    std::snprintf(text, sizeof text, "CPU: %.1f of %.0f cores were busy", busy, cores);
  } else {
    std::snprintf(text, sizeof text, "%s: %.1f of %.0f cores were busy", from_disk ? "disk" : "workers and memory",
                  busy, cores);
  }
  return text;
}

struct Report {
  bool disk = false;  // Whether it could be measured.
  Search from_disk;
  Search from_cache;
  std::string disk_limit;
  std::string cache_limit;
  Setting pick = kUsual;
  std::vector<double> gains;  // Medians, relative: from disk if that could be measured, and from the page cache.
  bool kept_default = true;
  std::string kept;      // The file of the profile.
  std::string not_kept;  // Why there is none.
};

double copies(Subject& subject) {
  const auto memory = subject.memory.bytes().first(subject.checkpoint.metadata().payload_bytes);
  const auto rate = [&](auto read) {
    const double seconds = measure([&] { read(subject.checkpoint.path(), memory); }).seconds;
    return static_cast<double>(memory.size()) / seconds / 1e9;
  };
  return std::max({rate(read_buffered), rate(copy_mapped), rate(read_buffered), rate(copy_mapped)});
}

Report tune(Subject& subject, double budget_s) {
  Report report;
  report.disk = try_drop_from_page_cache(subject.checkpoint.path());
  const auto begin = Clock::now();
  fit(subject, report.disk ? CachePolicy::kDirect : CachePolicy::kBuffered, budget_s / 100);
  if (report.disk) {
    report.from_disk = search(subject, coarse_settings(kUsual), CachePolicy::kDirect, begin, budget_s * 0.6, budget_s);
    report.pick = choose(report.from_disk.cells).setting;
    report.disk_limit = limit_of(report.from_disk, true, 0);
  }
  warm_page_cache(subject.checkpoint.path());
  report.from_cache = search(subject, worker_settings(report.pick, std::thread::hardware_concurrency()),
                             CachePolicy::kBuffered, begin, budget_s * 0.8, budget_s);
  report.pick = choose(report.from_cache.cells).setting;
  report.cache_limit = limit_of(report.from_cache, false, copies(subject));
  if (report.pick == kUsual) return report;
  const auto share = [&](double part) {
    return begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(budget_s * part));
  };
  std::vector<std::vector<double>> ratios;
  if (report.disk) ratios.push_back(ratios_of(subject, report.pick, CachePolicy::kDirect, share(0.9)));
  ratios.push_back(ratios_of(subject, report.pick, CachePolicy::kBuffered, share(1)));
  for (const std::vector<double>& pairs : ratios) report.gains.push_back(median(pairs) - 1);
  report.kept_default = !is_better(std::move(ratios));
  return report;
}

void keep(Report& report, const Flags& flags) {
  report.not_kept = "--dry_run";
  if (flags.dry_run) return;
  try {
    keep_profile(flags.path, options_of(report.kept_default ? kUsual : report.pick));
    report.kept = profiles_path();
    report.not_kept.clear();
  } catch (const Error& error) {
    report.not_kept = error.what();
  }
}

void print_table(const char* title, const Search& search, const std::string& limit) {
  std::printf("\n%-36s %8s %10s %8s\n", title, "GB/s", "ms CPU/GB", "samples");
  std::vector<Cell> cells = search.cells;
  std::stable_sort(cells.begin(), cells.end(), [](const Cell& a, const Cell& b) { return a.gb_per_s > b.gb_per_s; });
  const Setting chosen = choose(search.cells).setting;
  for (const Cell& cell : cells) {
    std::printf("%c %-34s %8.2f %10.0f %8d%s\n", cell.setting == chosen ? '*' : ' ', text_of(cell.setting).c_str(),
                cell.gb_per_s, cell.cpu_s_per_gb * 1e3, cell.samples,
                cell.setting == search.cells.front().setting ? "  compared with" : "");
  }
  std::printf("limit: %s\n", limit.c_str());
}

void print_text(const Report& report, const Subject& subject) {
  if (report.disk) {
    print_table("disk", report.from_disk, report.disk_limit);
  } else {
    std::printf(
        "%s stays in the page cache, as on tmpfs: reads from a disk cannot be measured here, and so no queue depth.\n",
        subject.checkpoint.path().c_str());
  }
  print_table("page cache", report.from_cache, report.cache_limit);
  std::printf(
      "\nrule: the default stays unless another setting is more than %.0f %% faster. Of those within %.0f %% of the "
      "fastest,\nand no slower than the default, * costs the least CPU in steps of %.0f ms per GB, then has the fewest "
      "bytes in flight.\nIn the end it is measured in turns with the default: it has to be %.0f %% faster in three of "
      "four pairs\nfrom disk or from the page cache, and slower in neither.\n",
      kTolerance * 100, kTolerance * 100, kCpuStepSPerGb * 1e3, kTolerance * 100);
  for (std::size_t i = 0; i < report.gains.size(); ++i) {
    std::printf("in turns, %s: %s has %+.1f %% of speed against the default\n",
                i == 0 && report.disk ? "disk" : "page cache", text_of(report.pick).c_str(), report.gains[i] * 100);
  }
  if (!subject.fallback_reason.empty()) std::printf("It did without: %s\n", subject.fallback_reason.c_str());
  const Setting best = report.kept_default ? kUsual : report.pick;
  std::printf("\nbest: EngineOptions{.chunk_bytes = %u << 20, .queue_depth = %u, .workers = %u}%s\n",
              best.chunk_bytes >> 20, best.queue_depth, best.workers, report.kept_default ? "   the default" : "");
  std::printf(report.kept.empty() ? "not kept: %s\n" : "kept in %s\n",
              report.kept.empty() ? report.not_kept.c_str() : report.kept.c_str());
}

namespace json = boost::json;

json::object object_of(const Setting& setting) {
  return {{"chunk_bytes", setting.chunk_bytes}, {"queue_depth", setting.queue_depth}, {"workers", setting.workers}};
}

json::array array_of(const Search& search) {
  json::array all;
  for (const Cell& cell : search.cells) {
    json::object object = object_of(cell.setting);
    object["gb_per_s"] = cell.gb_per_s;
    object["cpu_s_per_gb"] = cell.cpu_s_per_gb;
    object["samples"] = cell.samples;
    all.push_back(std::move(object));
  }
  return all;
}

void print_json(const Report& report) {
  json::array gains;
  for (const double each : report.gains) gains.push_back(each);
  const json::object all{{"best", object_of(report.kept_default ? kUsual : report.pick)},
                         {"is_default", report.kept_default},
                         {"gains", std::move(gains)},
                         {"disk", array_of(report.from_disk)},
                         {"disk_limit", report.disk_limit},
                         {"page_cache", array_of(report.from_cache)},
                         {"page_cache_limit", report.cache_limit},
                         {"kept", report.kept},
                         {"not_kept", report.not_kept}};
  std::printf("%s\n", json::serialize(all).c_str());
}

int run(Flags flags) {
  if (!std::filesystem::is_directory(flags.path)) {
    if (!std::filesystem::exists(flags.path))
      throw Error(std::make_error_code(std::errc::no_such_file_or_directory), flags.path.string(), flags.path);
    flags.path = std::filesystem::absolute(flags.path).parent_path();
  }
  const auto size_bytes = static_cast<std::uint64_t>(flags.size_gib * (1 << 30));
  const std::string name = "flashpack_tune." + std::to_string(::getpid()) + ".flashpack";
  Subject subject(flags.path / name, size_bytes);
  Report report = tune(subject, flags.budget_s);
  keep(report, flags);
  flags.json ? print_json(report) : print_text(report, subject);
  return flags.dry_run || !report.kept.empty() ? 0 : kExitNotKept;
}

constexpr const char* kDescription =
    "Measures how this machine reads a disk with chunks, queue depths and workers of various sizes, and keeps what is\n"
    "best in $XDG_CONFIG_HOME/flashpack/tune.json, else ~/.config/flashpack/tune.json, where tuned_options() finds it.";

constexpr const char* kFooter =
    "Exit status: 0 it was measured, and kept unless --dry_run; 1 it failed; 2 wrong usage; 3 it was measured, but no\n"
    "profile could be kept: on tmpfs, where nothing can be recognised another time, or without a place to write.";

}  // namespace
}  // namespace flashpack::bench

int main(int argc, char** argv) try {
  using namespace flashpack::bench;
  Flags flags;
  CLI::App app(kDescription, "flashpack_tune");
  app.footer(kFooter);
  app.add_option("PATH", flags.path, "A directory on the disk to tune for, or a file in it")->capture_default_str();
  app.add_option("--budget", flags.budget_s, "Time to measure, as 60 or 60s; to write the file comes on top")
      ->transform(CLI::AsNumberWithUnit(std::map<std::string, double>{{"s", 1}, {"min", 60}}))
      ->capture_default_str();
  app.add_option("--size_gib", flags.size_gib, "Size of the generated file, which is removed in the end")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_flag("--dry_run", flags.dry_run, "Keep no profile");
  app.add_flag("--json", flags.json, "Print one object");
  try {
    app.parse(argc, argv);
    if (!(flags.budget_s > 0)) throw CLI::ValidationError("--budget", "must be more than 0");
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitUsage;
  }
  return run(std::move(flags));
} catch (const std::exception& error) {
  std::fprintf(stderr, "flashpack_tune: %s\n", error.what());
  return flashpack::bench::kExitFailed;
}
