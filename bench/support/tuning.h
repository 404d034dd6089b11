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
  double spread = 0;  ///< Relative half range of the samples behind gb_per_s.
};

/// The cell to use: of those as fast as the fastest within the noise, the one that costs the least CPU, in steps of
/// 0.01 core-seconds per GB; of equals the one with the fewest bytes in flight, because they are memory and latency.
/// Noise is the fastest cell's spread, but at least 2 % and at most 10 %. Requires: not empty.
Cell choose(const std::vector<Cell>& cells);

}  // namespace flashpack::bench
