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

/// How much slower than the fastest cell one may be that costs less.
inline constexpr double kTolerance = 0.03;
/// Cells whose costs are the same in whole steps of this cost the same.
inline constexpr double kCpuStepSPerGb = 0.01;

const Cell& fastest(const std::vector<Cell>& cells);

/// The cell to use: of those within kTolerance of the fastest, the one that costs the least CPU; of equals the one with
/// the fewest bytes in flight, because they are memory and latency. Requires: not empty.
const Cell& choose(const std::vector<Cell>& cells);

}  // namespace flashpack::bench
