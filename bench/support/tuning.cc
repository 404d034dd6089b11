#include "bench/support/tuning.h"

#include <algorithm>
#include <cmath>
#include <tuple>

namespace flashpack::bench {

namespace {

constexpr std::uint32_t kMiB = 1u << 20;
constexpr std::uint32_t kMaxChunkBytes = 64 * kMiB;
constexpr std::uint32_t kMaxDepth = 128;
// More costs memory that no disk is known to need.
constexpr std::uint64_t kMaxInFlightBytes = std::uint64_t{512} * kMiB;
constexpr std::size_t kKept = 3;

void add(std::vector<Setting>& settings, const Setting& setting) {
  if (std::find(settings.begin(), settings.end(), setting) == settings.end()) settings.push_back(setting);
}

std::vector<Setting> neighbours(const Setting& of) {
  std::vector<Setting> all;
  const bool room = std::uint64_t{of.chunk_bytes} * of.queue_depth * 2 <= kMaxInFlightBytes;
  if (of.queue_depth > 1) all.push_back({of.chunk_bytes, of.queue_depth / 2, of.workers});
  if (room && of.queue_depth < kMaxDepth) all.push_back({of.chunk_bytes, of.queue_depth * 2, of.workers});
  if (of.chunk_bytes > kMiB) all.push_back({of.chunk_bytes / 2, of.queue_depth, of.workers});
  if (room && of.chunk_bytes < kMaxChunkBytes) all.push_back({of.chunk_bytes * 2, of.queue_depth, of.workers});
  return all;
}

bool measured(const std::vector<Cell>& cells, const Setting& setting) {
  return std::any_of(cells.begin(), cells.end(), [&](const Cell& cell) { return cell.setting == setting; });
}

}  // namespace

Latency latency_of(std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  const auto at = [&](std::size_t percent) { return seconds[(seconds.size() * percent + 99) / 100 - 1]; };
  return {.p50_s = at(50), .p95_s = at(95), .p99_s = at(99)};
}

std::vector<Setting> coarse_settings(const Setting& usual) {
  std::vector<Setting> all{usual};
  for (const std::uint32_t chunk_mib : {1u, 4u, 16u}) {
    for (const std::uint32_t depth : {2u, 8u, 32u}) add(all, {chunk_mib * kMiB, depth, usual.workers});
  }
  return all;
}

std::vector<Setting> worker_settings(const Setting& usual, unsigned cores) {
  std::vector<Setting> all{usual};
  for (std::uint32_t workers = 1; workers <= std::min(2 * cores, 64u); workers *= 2)
    add(all, {usual.chunk_bytes, usual.queue_depth, workers});
  return all;
}

std::vector<Setting> next_round(const std::vector<Cell>& cells, bool refine) {
  std::vector<Cell> order = cells;
  std::stable_sort(order.begin(), order.end(), [](const Cell& a, const Cell& b) { return a.gb_per_s > b.gb_per_s; });
  std::vector<Setting> next{cells.front().setting};
  for (std::size_t i = 0; i < std::min(kKept, order.size()); ++i) add(next, order[i].setting);
  const std::size_t known = next.size();
  if (refine) {
    for (const Setting& beside : neighbours(order.front().setting)) {
      if (!measured(cells, beside)) add(next, beside);
    }
  }
  const bool sure = std::min(cells.front().samples, order.front().samples) >= kEnoughSamples;
  return sure && next.size() == known ? std::vector<Setting>() : next;
}

const Cell& choose(const std::vector<Cell>& cells) {
  const Cell& usual = cells.front();
  const Cell* best = &*std::max_element(cells.begin(), cells.end(),
                                        [](const Cell& a, const Cell& b) { return a.gb_per_s < b.gb_per_s; });
  if (best->gb_per_s <= usual.gb_per_s * (1 + kTolerance)) return usual;
  const double floor = std::max(best->gb_per_s * (1 - kTolerance), usual.gb_per_s);
  const auto cost = [](const Cell& cell) {
    const Setting& setting = cell.setting;
    return std::tuple(std::lround(cell.cpu_s_per_gb / kCpuStepSPerGb),
                      std::uint64_t{setting.chunk_bytes} * setting.queue_depth, setting.workers);
  };
  for (const Cell& cell : cells) {
    if (cell.gb_per_s >= floor && cost(cell) < cost(*best)) best = &cell;
  }
  return *best;
}

bool is_better(std::vector<std::vector<double>> ratios) {
  bool gains = false;
  for (std::vector<double>& pairs : ratios) {
    if (pairs.empty()) return false;
    std::sort(pairs.begin(), pairs.end());
    const std::size_t quarter = pairs.size() / 4;
    if (pairs[pairs.size() / 2] < 1 - kTolerance && pairs[pairs.size() - 1 - quarter] < 1) return false;
    gains = gains || pairs[quarter] > 1 + kTolerance;
  }
  return gains;
}

}  // namespace flashpack::bench
