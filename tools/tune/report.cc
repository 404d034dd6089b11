#include "tools/tune/report.h"

#include <unistd.h>

#include <algorithm>
#include <boost/json/array.hpp>
#include <boost/json/object.hpp>
#include <boost/json/serialize.hpp>
#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <utility>

#include "bench/support/measure.h"
#include "engine/ground/option_limits.h"
#include "tools/tune/choice.h"
#include "tools/tune/heat_map.h"

namespace flashpack::bench {

namespace {

namespace json = boost::json;

bool shows_colours() {
  const char* const refused = std::getenv("NO_COLOR");
  const char* const terminal = std::getenv("TERM");
  return ::isatty(STDOUT_FILENO) != 0 && (refused == nullptr || *refused == '\0') && terminal != nullptr &&
         std::string_view(terminal) != "dumb";
}

// With the staging memory that an engine has, whether the setting gives it or not.
Setting with_staging(Setting setting, Device device) {
  setting.staging_bytes = options_of(setting, device).staging_bytes;
  return setting;
}

void print_what_is_not_measured(const Report& report) {
  if (report.disk.cells.empty()) {
    std::printf(
        "Files in %s stay in the page cache, as on tmpfs: reads from a disk cannot be measured here, nor writes to it, "
        "and so no queue depth, backend or policy.\n",
        report.directory.c_str());
  }
  if (!report.no_page_cache.empty()) {
    std::printf("\nFiles in %s do not stay in the page cache: loads from it cannot be measured here (%s).\n",
                report.directory.c_str(), report.no_page_cache.c_str());
  }
  if (!report.server.empty()) {
    std::printf(
        "\n%s is on the network file system of %s: whether a read past the page cache of this machine comes from the "
        "server's memory\nor from its disk cannot be told, and what is found holds for that server and path.\n",
        report.directory.c_str(), report.server.c_str());
  }
}

void print_staging_map(const Report& report) {
  std::vector<Cell> cells = report.page_cache.cells;
  const Setting chosen = choose(cells).setting;
  for (Cell& cell : cells) cell.setting = with_staging(cell.setting, report.device);
  std::printf("\npage cache, GB/s\n%s",
              heat_map(cells, with_staging(chosen, report.device), shows_colours(), Columns::kStaging).c_str());
}

void print_table(const char* title, const Table& table, bool map) {
  if (table.cells.empty()) return;
  std::size_t width = 34;
  for (const Cell& cell : table.cells) width = std::max(width, text_of(cell.setting).size());
  const auto field = static_cast<int>(width);
  std::printf("\n%-*s %8s %10s %8s %20s\n", field + 2, title, "GB/s", "ms CPU/GB", "samples",
              map ? "ms p50 / p95 / p99" : "");
  std::vector<Cell> cells = table.cells;
  std::stable_sort(cells.begin(), cells.end(), [](const Cell& a, const Cell& b) { return a.gb_per_s > b.gb_per_s; });
  const Setting chosen = choose(table.cells).setting;
  for (const Cell& cell : cells) {
    char latency[32] = "";
    if (const auto& at = cell.latency)
      std::snprintf(latency, sizeof latency, "%.2f / %.2f / %.2f", at->p50_s * 1e3, at->p95_s * 1e3, at->p99_s * 1e3);
    std::printf("%c %-*s %8.2f %10.0f %8d %20s%s\n", cell.setting == chosen ? '*' : ' ', field,
                text_of(cell.setting).c_str(), cell.gb_per_s, cell.cpu_s_per_gb * 1e3, cell.samples, latency,
                cell.setting == table.cells.front().setting ? "  compared with" : "");
  }
  std::printf("limit: %s\n", table.limit.c_str());
  if (map) std::printf("\n%s, GB/s\n%s", title, heat_map(table.cells, chosen, shows_colours()).c_str());
}

void print_policies(const Report& report) {
  if (report.cold.empty() && report.cached.empty()) return;
  std::printf("\npolicy of loads with %s\n%-28s %8s %10s %8s\n", text_of(setting_of(report)).c_str(), "", "GB/s",
              "ms CPU/GB", "samples");
  for (const auto& [state, cells] : {std::pair{"nothing cached", &report.cold}, {"all cached", &report.cached}}) {
    if (cells->empty()) continue;
    const CachePolicy chosen = choose(*cells).policy;
    for (const PolicyCell& cell : *cells) {
      std::printf("%c %-16s%-10s %8.2f %10.0f %8d\n", cell.policy == chosen ? '*' : ' ', state, to_string(cell.policy),
                  cell.gb_per_s, cell.cpu_s_per_gb * 1e3, cell.samples);
    }
  }
  std::printf(
      "Policies are only shown: each load has its own, LoadRequest::cache, which is auto unless the caller says "
      "otherwise.\n");
}

void print_rule() {
  std::printf(
      "\nrule: the default stays unless another setting is more than %.0f %% faster. Among those within %.0f %% of the "
      "fastest,\nno slower than the default, and with at most %.1f busy cores more than the cheapest, * has the least "
      "staging memory,\nor the fewest bytes in flight where that is not given. In the end it is measured in turns with "
      "the default: it has to\nbe %.0f %% faster in the median and faster in %zu of %zu pairs, or %zu of %zu, from "
      "disk or from the page cache, and in\nneither of them %.1f %% slower in the median, or %.0f %% beside a gain of "
      "%.0f %%.\n",
      kTolerance * 100, kTolerance * 100, kSpareCores, kTolerance * 100, kEnoughPairs - kEnoughPairs / kPairsForALoss,
      kEnoughPairs, 2 * kEnoughPairs - 2 * kEnoughPairs / kPairsForALoss, 2 * kEnoughPairs, kTolerance * 50,
      kTolerance * 100, kLargeGain * 100);
}

const char* name_of(Work work) { return work == Work::kDisk ? "disk" : "page cache"; }

void print_turns(const Report& report) {
  for (const Turns& turns : report.turns) {
    std::printf("\nin turns with the default, %s: %s\n", text_of(turns.setting).c_str(),
                turns.better ? "better" : "the default stays");
    for (const WayInTurns& way : turns.ways) {
      const double ratio = median(way.ratios);
      std::printf("  %-10s %8.2f GB/s beside %.2f (%+.1f %%, %zu pairs)\n", name_of(way.work),
                  way.default_gb_per_s * ratio, way.default_gb_per_s, (ratio - 1) * 100, way.ratios.size());
    }
  }
}

// As C++ that makes the engine.
void print_best(const Report& report) {
  const Setting best = setting_of(report);
  std::string device, staging;
  if (report.device.kind == Device::Kind::kCuda)
    device = ".device = {Device::Kind::kCuda, " + std::to_string(report.device.index) + "}, ";
  const std::uint64_t staging_bytes = with_staging(best, report.device).staging_bytes;
  if (staging_bytes != internal::usual_staging_bytes(report.device.kind))
    staging = ".staging_bytes = " + std::to_string(staging_bytes >> 20) + " << 20, ";
  std::printf("\nbest: EngineOptions{%s.chunk_bytes = %u << 20, .queue_depth = %u, %s.workers = %u%s}%s\n",
              device.c_str(), best.chunk_bytes >> 20, best.queue_depth, staging.c_str(), best.workers,
              best.backend == Backend::kWorkers ? ", .backend = Backend::kWorkers" : "",
              report.kept_default ? "   the default" : "");
}

json::object object_of(const Setting& setting, Device device) {
  return {{"chunk_bytes", setting.chunk_bytes},
          {"queue_depth", setting.queue_depth},
          {"workers", setting.workers},
          {"staging_bytes", with_staging(setting, device).staging_bytes},
          {"backend", to_string(setting.backend)}};
}

json::array array_of(const std::vector<PolicyCell>& cells) {
  json::array all;
  for (const PolicyCell& cell : cells) {
    all.push_back(json::object{{"policy", to_string(cell.policy)},
                               {"gb_per_s", cell.gb_per_s},
                               {"cpu_s_per_gb", cell.cpu_s_per_gb},
                               {"samples", cell.samples}});
  }
  return all;
}

json::array array_of(const std::vector<Cell>& cells, Device device) {
  json::array all;
  for (const Cell& cell : cells) {
    json::object object = object_of(cell.setting, device);
    object["gb_per_s"] = cell.gb_per_s;
    object["cpu_s_per_gb"] = cell.cpu_s_per_gb;
    object["samples"] = cell.samples;
    if (const auto& at = cell.latency)
      object["latency_s"] = json::object{{"p50", at->p50_s}, {"p95", at->p95_s}, {"p99", at->p99_s}};
    all.push_back(std::move(object));
  }
  return all;
}

json::array array_of(const std::vector<Turns>& turns, Device device) {
  json::array all;
  for (const Turns& each : turns) {
    json::object object = object_of(each.setting, device);
    object["better"] = each.better;
    for (const WayInTurns& way : each.ways) {
      object[way.work == Work::kDisk ? "disk" : "page_cache"] = json::object{
          {"default_gb_per_s", way.default_gb_per_s}, {"ratios", json::array(way.ratios.begin(), way.ratios.end())}};
    }
    all.push_back(std::move(object));
  }
  return all;
}

}  // namespace

std::string text_of(const Device& device) {
  return device.kind == Device::Kind::kHost ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::string text_of(const Setting& setting) {
  const std::string workers = setting.workers == 0 ? "default" : std::to_string(setting.workers);
  const std::string staging =
      setting.staging_bytes == 0 ? "" : ", " + std::to_string(setting.staging_bytes >> 20) + " MiB staging";
  return std::to_string(setting.chunk_bytes >> 20) + " MiB x " + std::to_string(setting.queue_depth) + ", " + workers +
         " workers" + staging + (setting.backend == Backend::kWorkers ? ", reads by them" : "");
}

void print_text(const Report& report) {
  if (report.link_gb_per_s > 0)
    std::printf("\nlink to %s: %.1f GB/s, by copies of page-locked memory\n", text_of(report.device).c_str(),
                report.link_gb_per_s);
  if (report.verified_bytes > 0) std::printf("\nLoads compare checksums.\n");
  print_what_is_not_measured(report);
  print_table("disk", report.disk, true);
  if (!report.no_latency.empty()) std::printf("requests could not be timed: %s\n", report.no_latency.c_str());
  print_table("page cache", report.page_cache, false);
  if (report.device.kind == Device::Kind::kCuda && !report.page_cache.cells.empty()) print_staging_map(report);
  print_table("durable writes", report.writes, true);
  if (!report.no_writes.empty()) std::printf("\ndurable writes could not be measured: %s\n", report.no_writes.c_str());
  if (!report.writes.cells.empty()) {
    std::printf(
        "Writes are only shown, and no profile has a setting for them: an engine has one for both ways, the best one "
        "for\nloads. Saves from Python use the defaults.\n");
  }
  print_policies(report);
  for (const auto& [state, reason] : {std::pair{"nothing", &report.no_cold}, {"all", &report.no_cached}}) {
    if (!reason->empty()) std::printf("policies were not compared with %s cached: %s\n", state, reason->c_str());
  }
  print_rule();
  if (!report.no_backend.empty()) std::printf("backends were not compared: %s\n", report.no_backend.c_str());
  print_turns(report);
  if (!report.fallback_reason.empty()) std::printf("It did without: %s\n", report.fallback_reason.c_str());
  print_best(report);
  std::printf(report.kept.empty() ? "not kept: %s\n" : "kept in %s\n",
              report.kept.empty() ? report.not_kept.c_str() : report.kept.c_str());
}

std::string json_of(const Report& report) {
  return json::serialize(json::object{{"directory", report.directory.string()},
                                      {"device", text_of(report.device)},
                                      {"server", report.server},
                                      {"link_gb_per_s", report.link_gb_per_s},
                                      {"read_bytes", report.read_bytes},
                                      {"verified_bytes", report.verified_bytes},
                                      {"best", object_of(setting_of(report), report.device)},
                                      {"default", object_of(kUsual, report.device)},
                                      {"is_default", report.kept_default},
                                      {"pick", object_of(report.pick, report.device)},
                                      {"turns", array_of(report.turns, report.device)},
                                      {"disk", array_of(report.disk.cells, report.device)},
                                      {"disk_limit", report.disk.limit},
                                      {"disk_plain_gb_per_s", report.disk.plain_gb_per_s},
                                      {"no_latency", report.no_latency},
                                      {"page_cache", array_of(report.page_cache.cells, report.device)},
                                      {"page_cache_limit", report.page_cache.limit},
                                      {"no_page_cache", report.no_page_cache},
                                      {"writes", array_of(report.writes.cells, report.device)},
                                      {"writes_limit", report.writes.limit},
                                      {"writes_plain_gb_per_s", report.writes.plain_gb_per_s},
                                      {"no_writes", report.no_writes},
                                      {"no_backend", report.no_backend},
                                      {"fallback_reason", report.fallback_reason},
                                      {"policies_cold", array_of(report.cold)},
                                      {"policies_cached", array_of(report.cached)},
                                      {"no_policies_cold", report.no_cold},
                                      {"no_policies_cached", report.no_cached},
                                      {"kept", report.kept},
                                      {"not_kept", report.not_kept}});
}

}  // namespace flashpack::bench
