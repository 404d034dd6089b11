#include "tools/tune/grid.h"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "engine/ground/option_limits.h"
#include "engine/ground/units.h"

namespace flashpack::bench {

namespace {

using internal::kMaxWorkers;
using internal::kMiB;

constexpr std::uint32_t kMaxChunkBytes = 64 * kMiB;
constexpr std::uint32_t kMaxDepth = 128;
// More costs memory, and where requests take long 512 MiB were no faster, and loads from the page cache slower
// (bench/README.md).
constexpr std::uint64_t kMaxInFlightBytes = std::uint64_t{256} * kMiB;
// Slots that fit in the last level of a CPU's cache are copied to a GPU faster than those that do not.
constexpr std::array<std::uint32_t, 3> kSlotMib{1, 2, 4};
constexpr std::array<std::uint32_t, 6> kStagingMib{16, 24, 32, 48, 64, 96};

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

// The number that an engine chooses has one form, no number, so that the same engine is not measured twice.
Setting with_workers(Setting setting, std::uint32_t workers, unsigned usual_workers) {
  setting.workers = workers == usual_workers ? 0 : workers;
  return setting;
}

std::uint32_t workers_of(const Setting& setting, unsigned usual_workers) {
  return setting.workers == 0 ? usual_workers : setting.workers;
}

// Each worker has one read in flight, which the depth must allow.
Setting reading_by_workers(Setting setting, std::uint32_t workers, unsigned usual_workers) {
  setting.queue_depth = std::max(setting.queue_depth, workers);
  return with_workers(setting, workers, usual_workers);
}

bool has_room(const Setting& setting) {
  return std::uint64_t{setting.chunk_bytes} * setting.queue_depth <= kMaxInFlightBytes;
}

}  // namespace

std::vector<Setting> coarse_settings(const Setting& usual) {
  std::vector<Setting> all{usual};
  for (const std::uint32_t chunk_mib : {1u, 4u, 8u}) {
    for (const std::uint32_t depth : {2u, 8u, 32u}) add_new(all, {chunk_mib * kMiB, depth, usual.workers});
  }
  return all;
}

std::vector<Setting> worker_settings(const Setting& usual, unsigned cores, unsigned usual_workers) {
  std::vector<Setting> all{usual};
  for (std::uint32_t workers = 1; workers <= std::min(2 * cores, kMaxWorkers); workers *= 2)
    add_new(all, with_workers(usual, workers, usual_workers));
  return all;
}

std::vector<Setting> beside_on_disk(const Setting& of) {
  std::vector<Setting> all;
  const auto add_beside = [&](std::uint32_t chunk_bytes, std::uint32_t depth) {
    all.push_back(of);
    all.back().chunk_bytes = chunk_bytes;
    all.back().queue_depth = depth;
  };
  const bool room = std::uint64_t{of.chunk_bytes} * of.queue_depth * 2 <= kMaxInFlightBytes;
  if (of.queue_depth > 1) add_beside(of.chunk_bytes, of.queue_depth / 2);
  if (room && of.queue_depth < kMaxDepth) add_beside(of.chunk_bytes, of.queue_depth * 2);
  if (of.chunk_bytes > kMiB) add_beside(of.chunk_bytes / 2, of.queue_depth);
  if (room && of.chunk_bytes < kMaxChunkBytes) add_beside(of.chunk_bytes * 2, of.queue_depth);
  return all;
}

std::vector<Setting> coarse_settings_of_backends(const Setting& usual) {
  std::vector<Setting> all = coarse_settings(usual);
  // Each worker has one read in flight, so that a disk that wants many needs as many workers.
  for (const auto& [depth, workers] : {std::pair{usual.queue_depth, usual.workers}, {32u, 32u}}) {
    all.push_back(usual);
    all.back().queue_depth = depth;
    all.back().workers = workers;
    all.back().backend = Backend::kWorkers;
  }
  return all;
}

std::vector<Setting> beside_with_backends(const Setting& of, const Setting& usual, unsigned usual_workers) {
  std::vector<Setting> all = beside_on_disk(of);
  const bool by_workers = of.backend == Backend::kWorkers;
  Setting other = of;
  other.workers = usual.workers;
  other.backend = by_workers ? usual.backend : Backend::kWorkers;
  all.push_back(other);
  const std::uint32_t workers = workers_of(of, usual_workers);
  if (by_workers && workers > 1) all.push_back(with_workers(of, workers / 2, usual_workers));
  const Setting twice = reading_by_workers(of, workers * 2, usual_workers);
  if (by_workers && workers * 2 <= kMaxWorkers && has_room(twice)) all.push_back(twice);
  return all;
}

std::vector<Setting> coarse_settings_of_workers(const Setting& usual, unsigned usual_workers) {
  std::vector<Setting> all{usual};
  for (const std::uint32_t chunk_mib : {1u, 4u, 8u}) {
    for (const std::uint32_t workers : {usual_workers, 8u, 32u})
      add_new(all, reading_by_workers({chunk_mib * kMiB, usual.queue_depth}, workers, usual_workers));
  }
  return all;
}

std::vector<Setting> beside_by_workers(const Setting& of, const Setting& usual, unsigned usual_workers) {
  std::vector<Setting> all;
  const std::uint32_t workers = workers_of(of, usual_workers);
  const auto add_beside = [&](std::uint32_t chunk_bytes, std::uint32_t number) {
    all.push_back(reading_by_workers({chunk_bytes, usual.queue_depth}, number, usual_workers));
  };
  const bool room = std::uint64_t{of.chunk_bytes} * std::max(of.queue_depth, workers) * 2 <= kMaxInFlightBytes;
  if (workers > 1) add_beside(of.chunk_bytes, workers / 2);
  if (room && workers * 2 <= kMaxWorkers) add_beside(of.chunk_bytes, workers * 2);
  if (of.chunk_bytes > kMiB) add_beside(of.chunk_bytes / 2, workers);
  if (room && of.chunk_bytes < kMaxChunkBytes) add_beside(of.chunk_bytes * 2, workers);
  return all;
}

// The usual setting is one of the grid, and has one form, so that it is not measured twice.
Setting SlotGrid::at(std::uint64_t chunk_bytes, std::uint64_t staging_bytes, std::uint32_t workers) const {
  const std::uint64_t in_flight_bytes = std::uint64_t{usual_.chunk_bytes} * usual_.queue_depth;
  const std::uint64_t most = std::min<std::uint64_t>(staging_bytes / chunk_bytes, kMaxDepth);
  const std::uint64_t depth = std::clamp<std::uint64_t>(in_flight_bytes / chunk_bytes, 1, most);
  const bool is_usual = chunk_bytes == usual_.chunk_bytes && depth == usual_.queue_depth;
  return {static_cast<std::uint32_t>(chunk_bytes), static_cast<std::uint32_t>(depth), workers,
          is_usual && staging_bytes == staging_bytes_ ? usual_.staging_bytes : staging_bytes, usual_.backend};
}

std::vector<Setting> SlotGrid::coarse() const {
  std::vector<Setting> all{usual_};
  for (const std::uint32_t staging_mib : {16u, 32u, 96u}) {
    for (const std::uint32_t chunk_mib : kSlotMib)
      add_new(all, at(chunk_mib * kMiB, std::uint64_t{staging_mib} * kMiB, usual_.workers));
  }
  return all;
}

std::vector<Setting> SlotGrid::beside(const Setting& of) const {
  std::vector<Setting> all;
  const std::uint64_t staging_bytes = of.staging_bytes == 0 ? staging_bytes_ : of.staging_bytes;
  const std::uint32_t workers = workers_of(of, usual_workers_);
  const auto add_with_workers = [&](std::uint32_t number) { all.push_back(with_workers(of, number, usual_workers_)); };
  if (workers > 1) add_with_workers(std::bit_floor(workers - 1));
  if (std::bit_ceil(workers + 1) <= std::min(2 * cores_, kMaxWorkers)) add_with_workers(std::bit_ceil(workers + 1));
  for (const std::uint64_t bytes : next_in(kStagingMib, staging_bytes))
    all.push_back(at(of.chunk_bytes, std::max(bytes, std::uint64_t{2} * of.chunk_bytes), of.workers));
  for (const std::uint64_t bytes : next_in(kSlotMib, of.chunk_bytes))
    all.push_back(at(bytes, staging_bytes, of.workers));
  return all;
}

}  // namespace flashpack::bench
