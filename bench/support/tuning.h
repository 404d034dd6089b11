#pragma once

#include <cstdint>
#include <vector>

namespace flashpack::bench {

/// One measured pair of engine options.
struct Cell {
  std::uint32_t chunk_bytes = 0;
  std::uint32_t queue_depth = 0;
  double gb_per_s = 0;
  double cpu_s_per_gb = 0;
};

/// A cell that costs less CPU may be slower than the fastest by this part of its speed.
inline constexpr double kTolerance = 0.03;
/// Costs are compared in whole steps of this.
inline constexpr double kCpuStepSPerGb = 0.01;

const Cell& fastest(const std::vector<Cell>& cells);

/// Chooses, among the cells within kTolerance of the fastest, the one that costs the least CPU. If several cost the
/// same, it takes the one with the fewest bytes in flight, which cost memory and latency. Requires: not empty.
const Cell& choose(const std::vector<Cell>& cells);

}  // namespace flashpack::bench
