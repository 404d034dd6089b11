#include "tools/tune/cell.h"

#include <algorithm>

namespace flashpack::bench {

void add_new(std::vector<Setting>& settings, const Setting& setting) {
  if (std::find(settings.begin(), settings.end(), setting) == settings.end()) settings.push_back(setting);
}

Latency latency_of(std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  const auto at = [&](std::size_t percent) { return seconds[(seconds.size() * percent + 99) / 100 - 1]; };
  return {.p50_s = at(50), .p95_s = at(95), .p99_s = at(99)};
}

}  // namespace flashpack::bench
