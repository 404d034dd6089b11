#include "bench/support/tuning.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace flashpack::bench {

Cell choose(const std::vector<Cell>& cells) {
  const Cell& fastest = *std::max_element(cells.begin(), cells.end(),
                                          [](const Cell& a, const Cell& b) { return a.gb_per_s < b.gb_per_s; });
  const double floor = fastest.gb_per_s * (1 - std::clamp(fastest.spread, 0.02, 0.10));
  const auto cost = [](const Cell& cell) {
    return std::pair(std::lround(cell.cpu_s_per_gb / 0.01), std::uint64_t{cell.chunk_bytes} * cell.queue_depth);
  };
  const Cell* best = &fastest;
  for (const Cell& cell : cells) {
    if (cell.gb_per_s >= floor && cost(cell) < cost(*best)) best = &cell;
  }
  return *best;
}

}  // namespace flashpack::bench
