#include "bench/support/tuning.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <tuple>

namespace flashpack::bench {

namespace {

constexpr std::uint32_t kMiB = 1u << 20;
constexpr std::uint32_t kMaxChunkBytes = 64 * kMiB;
constexpr std::uint32_t kMaxDepth = 128;
// More costs memory that no disk is known to need.
constexpr std::uint64_t kMaxInFlightBytes = std::uint64_t{512} * kMiB;
constexpr std::size_t kKept = 3;
constexpr std::uint32_t kMaxWorkers = 64;
// Slots that fit in the last level of a CPU's cache are copied to a GPU faster than those that do not.
constexpr std::array<std::uint32_t, 3> kSlotMib{1, 2, 4};
constexpr std::array<std::uint32_t, 6> kStagingMib{16, 24, 32, 48, 64, 96};

void add(std::vector<Setting>& settings, const Setting& setting) {
  if (std::find(settings.begin(), settings.end(), setting) == settings.end()) settings.push_back(setting);
}

// The values of `grid`, in MiB, next to `bytes` on both sides.
template <std::size_t N>
std::vector<std::uint64_t> next_in(const std::array<std::uint32_t, N>& grid, std::uint64_t bytes) {
  std::vector<std::uint64_t> both;
  const auto above = std::upper_bound(grid.begin(), grid.end(), bytes / kMiB);
  const auto at = std::lower_bound(grid.begin(), grid.end(), bytes / kMiB);
  if (at != grid.begin()) both.push_back(std::uint64_t{*(at - 1)} * kMiB);
  if (above != grid.end()) both.push_back(std::uint64_t{*above} * kMiB);
  return both;
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
  for (std::uint32_t workers = 1; workers <= std::min(2 * cores, kMaxWorkers); workers *= 2)
    add(all, {usual.chunk_bytes, usual.queue_depth, workers});
  return all;
}

std::vector<Setting> beside_on_disk(const Setting& of) {
  std::vector<Setting> all;
  const auto add_beside = [&](std::uint32_t chunk_bytes, std::uint32_t depth) {
    all.push_back({chunk_bytes, depth, of.workers, of.staging_bytes});
  };
  const bool room = std::uint64_t{of.chunk_bytes} * of.queue_depth * 2 <= kMaxInFlightBytes;
  if (of.queue_depth > 1) add_beside(of.chunk_bytes, of.queue_depth / 2);
  if (room && of.queue_depth < kMaxDepth) add_beside(of.chunk_bytes, of.queue_depth * 2);
  if (of.chunk_bytes > kMiB) add_beside(of.chunk_bytes / 2, of.queue_depth);
  if (room && of.chunk_bytes < kMaxChunkBytes) add_beside(of.chunk_bytes * 2, of.queue_depth);
  return all;
}

// The usual setting is one of the grid, and has one form, so that it is not measured twice.
Setting SlotGrid::at(std::uint64_t chunk_bytes, std::uint64_t staging_bytes, std::uint32_t workers) const {
  const std::uint64_t in_flight_bytes = std::uint64_t{usual_.chunk_bytes} * usual_.queue_depth;
  const std::uint64_t most = std::min<std::uint64_t>(staging_bytes / chunk_bytes, kMaxDepth);
  const std::uint64_t depth = std::clamp<std::uint64_t>(in_flight_bytes / chunk_bytes, 1, most);
  const bool is_usual = chunk_bytes == usual_.chunk_bytes && depth == usual_.queue_depth;
  return {static_cast<std::uint32_t>(chunk_bytes), static_cast<std::uint32_t>(depth), workers,
          is_usual && staging_bytes == staging_bytes_ ? usual_.staging_bytes : staging_bytes};
}

std::vector<Setting> SlotGrid::coarse() const {
  std::vector<Setting> all{usual_};
  for (const std::uint32_t staging_mib : {16u, 32u, 96u}) {
    for (const std::uint32_t chunk_mib : kSlotMib)
      add(all, at(chunk_mib * kMiB, std::uint64_t{staging_mib} * kMiB, usual_.workers));
  }
  return all;
}

std::vector<Setting> SlotGrid::beside(const Setting& of) const {
  std::vector<Setting> all;
  const std::uint64_t staging_bytes = of.staging_bytes == 0 ? staging_bytes_ : of.staging_bytes;
  const std::uint32_t workers = of.workers == 0 ? workers_ : of.workers;
  const auto with_workers = [&](std::uint32_t number) {
    all.push_back(of);
    all.back().workers = number == workers_ ? usual_.workers : number;
  };
  if (workers > 1) with_workers(std::bit_floor(workers - 1));
  if (std::bit_ceil(workers + 1) <= std::min(2 * cores_, kMaxWorkers)) with_workers(std::bit_ceil(workers + 1));
  for (const std::uint64_t bytes : next_in(kStagingMib, staging_bytes))
    all.push_back(at(of.chunk_bytes, std::max(bytes, std::uint64_t{2} * of.chunk_bytes), of.workers));
  for (const std::uint64_t bytes : next_in(kSlotMib, of.chunk_bytes))
    all.push_back(at(bytes, staging_bytes, of.workers));
  return all;
}

std::vector<Setting> next_round(const std::vector<Cell>& cells, const Neighbours& neighbours) {
  std::vector<Cell> order = cells;
  std::stable_sort(order.begin(), order.end(), [](const Cell& a, const Cell& b) { return a.gb_per_s > b.gb_per_s; });
  std::vector<Setting> next{cells.front().setting};
  for (std::size_t i = 0; i < std::min(kKept, order.size()); ++i) add(next, order[i].setting);
  const std::size_t known = next.size();
  if (neighbours) {
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
    const std::uint64_t in_flight_bytes = std::uint64_t{setting.chunk_bytes} * setting.queue_depth;
    return std::tuple(std::lround(cell.cpu_s_per_gb / kCpuStepSPerGb),
                      setting.staging_bytes != 0 ? setting.staging_bytes : in_flight_bytes, setting.workers);
  };
  for (const Cell& cell : cells) {
    if (cell.gb_per_s >= floor && cost(cell) < cost(*best)) best = &cell;
  }
  return *best;
}

std::string limit_of(const Cell& best, const char* otherwise, const Ceilings& ceilings) {
  constexpr double kNear = 0.85;
  char text[160];
  const double busy = best.cpu_s_per_gb * best.gb_per_s;
  if (ceilings.link > 0 && best.gb_per_s > kNear * ceilings.link) {
    std::snprintf(text, sizeof text, "link: copies of page-locked memory to the GPU reach %.1f GB/s", ceilings.link);
  } else if (ceilings.copies > 0 && best.gb_per_s > kNear * ceilings.copies) {
    std::snprintf(text, sizeof text, "memory: plain copies by all cores reach %.1f GB/s", ceilings.copies);
  } else {
    std::snprintf(text, sizeof text, "%s: %.1f of %u cores were busy", busy > 0.8 * ceilings.cores ? "CPU" : otherwise,
                  busy, ceilings.cores);
  }
  return text;
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
