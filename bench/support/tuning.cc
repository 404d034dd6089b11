#include "bench/support/tuning.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace flashpack::bench {

const Cell& fastest(const std::vector<Cell>& cells) {
  return *std::max_element(cells.begin(), cells.end(),
                           [](const Cell& a, const Cell& b) { return a.gb_per_s < b.gb_per_s; });
}

const Cell& choose(const std::vector<Cell>& cells) {
  const Cell* best = &fastest(cells);
  const double floor = best->gb_per_s * (1 - kTolerance);
  const auto cost = [](const Cell& cell) {
    return std::pair(std::lround(cell.cpu_s_per_gb / kCpuStepSPerGb),
                     std::uint64_t{cell.chunk_bytes} * cell.queue_depth);
  };
  for (const Cell& cell : cells) {
    if (cell.gb_per_s >= floor && cost(cell) < cost(*best)) best = &cell;
  }
  return *best;
}

}  // namespace flashpack::bench
