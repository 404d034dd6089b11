#include "tools/tune/choice.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <tuple>

#include "bench/support/measure.h"

namespace flashpack::bench {

const Cell& choose(const std::vector<Cell>& cells) {
  const Cell& usual = cells.front();
  const Cell* best = &*std::max_element(cells.begin(), cells.end(),
                                        [](const Cell& a, const Cell& b) { return a.gb_per_s < b.gb_per_s; });
  if (best->gb_per_s <= usual.gb_per_s * (1 + kTolerance)) return usual;
  const double floor = std::max(best->gb_per_s * (1 - kTolerance), usual.gb_per_s);
  const auto busy_cores = [](const Cell& cell) { return cell.cpu_s_per_gb * cell.gb_per_s; };
  const auto memory = [](const Cell& cell) {
    const Setting& setting = cell.setting;
    const std::uint64_t in_flight_bytes = std::uint64_t{setting.chunk_bytes} * setting.queue_depth;
    return std::tuple(setting.staging_bytes != 0 ? setting.staging_bytes : in_flight_bytes, setting.workers,
                      setting.backend != Backend::kAuto);
  };
  double fewest_cores = busy_cores(*best);
  for (const Cell& cell : cells) {
    if (cell.gb_per_s >= floor) fewest_cores = std::min(fewest_cores, busy_cores(cell));
  }
  const auto is_cheap = [&](const Cell& cell) { return busy_cores(cell) <= fewest_cores + kSpareCores; };
  for (const Cell& cell : cells) {
    if (cell.gb_per_s < floor || !is_cheap(cell)) continue;
    if (!is_cheap(*best) || memory(cell) < memory(*best)) best = &cell;
  }
  return *best;
}

bool gains(const std::vector<double>& pairs) {
  const auto losing = std::ranges::count_if(pairs, [](double pair) { return pair <= 1; });
  const std::size_t may_lose = std::max(pairs.size(), kEnoughPairs) / kPairsForALoss;
  return median(pairs) > 1 + kTolerance && static_cast<std::size_t>(losing) <= may_lose;
}

bool is_better(const std::vector<std::vector<double>>& ratios) {
  double gain = 0;
  for (const std::vector<double>& pairs : ratios) gain = std::max(gain, gains(pairs) ? median(pairs) - 1 : 0);
  const double most_lost = gain > kLargeGain ? kTolerance : kTolerance / 2;
  const auto loses = [&](const std::vector<double>& pairs) { return median(pairs) < 1 - most_lost; };
  return gain > 0 && std::ranges::none_of(ratios, loses);
}

}  // namespace flashpack::bench
