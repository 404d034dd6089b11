#include "tools/tune/choice.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>

namespace flashpack::bench {

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
                      setting.staging_bytes != 0 ? setting.staging_bytes : in_flight_bytes, setting.workers,
                      setting.backend != Backend::kAuto);
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
    gains = gains || (pairs[pairs.size() / 2] > 1 + kTolerance && pairs[pairs.size() / 8] > 1);
  }
  return gains;
}

}  // namespace flashpack::bench
