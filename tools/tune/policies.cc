#include "tools/tune/policies.h"

#include <algorithm>
#include <array>

#include "bench/support/measure.h"
#include "bench/support/page_cache.h"
#include "tools/tune/choice.h"

namespace flashpack::bench {

const char* to_string(CachePolicy policy) {
  return policy == CachePolicy::kAuto ? "auto" : policy == CachePolicy::kDirect ? "direct" : "buffered";
}

std::vector<PolicyCell> measure_policies(Subject& subject, const Setting& setting, Cached cached,
                                         Budget::Clock::time_point end) {
  constexpr int kLeast = 3;
  constexpr int kMost = 15;
  constexpr std::array kPolicies{CachePolicy::kAuto, CachePolicy::kDirect, CachePolicy::kBuffered};
  if (cached == Cached::kWhole) warm_page_cache(subject.checkpoint.path());
  std::vector<PolicyCell> cells;
  std::vector<Series> series;
  for (const CachePolicy policy : kPolicies) {
    cells.push_back({.policy = policy});
    series.emplace_back(subject.sample_bytes(Work::kDisk));
  }
  for (int round = 0; round < kMost && (round < kLeast || Budget::Clock::now() < end); ++round) {
    for (std::size_t turn = 0; turn < cells.size(); ++turn) {
      // Another one begins each round, because what runs first may find the disk idle.
      const std::size_t at = (turn + static_cast<std::size_t>(round)) % cells.size();
      series[at].add(sample_policy(subject, setting, cells[at].policy, cached));
      ++cells[at].samples;
    }
  }
  for (std::size_t at = 0; at < cells.size(); ++at) {
    cells[at].gb_per_s = series[at].gb_per_s();
    cells[at].cpu_s_per_gb = series[at].cpu_s_per_gb();
  }
  return cells;
}

const PolicyCell& choose(const std::vector<PolicyCell>& cells) {
  const PolicyCell& fastest = *std::max_element(
      cells.begin(), cells.end(), [](const PolicyCell& a, const PolicyCell& b) { return a.gb_per_s < b.gb_per_s; });
  return fastest.gb_per_s > cells.front().gb_per_s * (1 + kTolerance) ? fastest : cells.front();
}

}  // namespace flashpack::bench
