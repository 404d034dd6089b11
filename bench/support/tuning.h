/// Chooses options of an engine from measurements. What is here is pure.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace flashpack::bench {

/// The options that are tuned. No workers and no staging_bytes mean what the engine chooses, or as much staging memory
/// as the reads in flight need, if that is more.
struct Setting {
  std::uint32_t chunk_bytes = 0;
  std::uint32_t queue_depth = 0;
  std::uint32_t workers = 0;
  std::uint64_t staging_bytes = 0;
  bool operator==(const Setting&) const = default;
};

/// The seconds in which half of the requests, 95 and 99 of a hundred were answered.
struct Latency {
  double p50_s = 0;
  double p95_s = 0;
  double p99_s = 0;
};

/// A cell holds the medians of the samples of one setting.
struct Cell {
  Setting setting;
  int samples = 0;
  double gb_per_s = 0;
  double cpu_s_per_gb = 0;
  std::optional<Latency> latency = std::nullopt;  ///< None if it has not been measured.
};

/// Takes the nearest rank. Requires: not empty.
Latency latency_of(std::vector<double> seconds);

/// At most this part of the speed is given up for less CPU or memory, and a gain below it is noise.
inline constexpr double kTolerance = 0.03;
/// Costs are compared in whole steps of this.
inline constexpr double kCpuStepSPerGb = 0.01;
/// Samples of the default and of the fastest setting after which a search ends.
inline constexpr int kEnoughSamples = 5;

/// The settings of the first round: `usual`, then chunks and depths that lie far apart.
std::vector<Setting> coarse_settings(const Setting& usual);
/// `usual`, then the same with 1, 2, 4, ... workers, up to twice as many as there are cores.
std::vector<Setting> worker_settings(const Setting& usual, unsigned cores);

/// The settings that lie beside another one.
using Neighbours = std::function<std::vector<Setting>(const Setting&)>;
/// Those with twice or half of its chunk size or queue depth.
std::vector<Setting> beside_on_disk(const Setting& of);

/// Settings for loads from the page cache to a GPU: chunk sizes, staging memory and numbers of workers.
///
/// Each keeps as many bytes in flight from a disk as `usual`, as far as its slots are enough, so that loads from the
/// disk suffer as little as they can.
class SlotGrid {
 public:
  /// An engine with `usual` has `staging_bytes` and `workers`, whether `usual` gives them or the engine chooses.
  SlotGrid(const Setting& usual, std::uint64_t staging_bytes, unsigned workers, unsigned cores)
      : usual_(usual), staging_bytes_(staging_bytes), workers_(workers), cores_(cores) {}

  /// `usual`, then chunks and staging memory that lie far apart.
  std::vector<Setting> coarse() const;
  /// The settings with the next chunk size, staging memory or number of workers. Requires: `of` is one of the grid.
  std::vector<Setting> beside(const Setting& of) const;

 private:
  Setting at(std::uint64_t chunk_bytes, std::uint64_t staging_bytes, std::uint32_t workers) const;

  Setting usual_;
  std::uint64_t staging_bytes_;
  unsigned workers_;
  unsigned cores_;
};

/// The settings to measure in the next round: the default, the fastest three, and what lies beside the fastest and has
/// not been measured; empty when another round would not change the choice. Without `neighbours` nothing lies beside.
/// Requires: the default is first.
std::vector<Setting> next_round(const std::vector<Cell>& cells, const Neighbours& neighbours);

/// Chooses the default, if the fastest is not more than kTolerance faster. Else, of those that are within kTolerance of
/// the fastest and no slower than the default, it chooses the one with the least CPU, in steps, then with the least
/// staging memory, or the fewest bytes in flight where that is not given, then with the fewest workers. Requires: the
/// default is first.
const Cell& choose(const std::vector<Cell>& cells);

/// Speeds in GB/s that no load can exceed, 0 where that is not known or does not matter.
struct Ceilings {
  double link = 0;    ///< Copies to a GPU.
  double copies = 0;  ///< Plain copies from memory to memory by all cores.
  unsigned cores = 1;
};
/// Says what kept the best setting from being faster. That is `otherwise` where the cell is near to no ceiling.
std::string limit_of(const Cell& best, const char* otherwise, const Ceilings& ceilings);

/// Whether a setting takes the place of the default: somewhere three quarters of the pairs gained more than kTolerance,
/// because a median alone may gain so much by chance, and nowhere did the median lose as much and three quarters of the
/// pairs lose anything. `ratios` has, for each
/// way to read, the speeds relative to the default of pairs that were measured in turns: 1.1 for a tenth faster.
bool is_better(std::vector<std::vector<double>> ratios);

}  // namespace flashpack::bench
