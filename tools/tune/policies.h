/// Compares the cache policies of loads. An engine has none, so that they are no part of a search for its options.
#pragma once

#include <vector>

#include "flashpack/engine.h"
#include "tools/tune/budget.h"
#include "tools/tune/cell.h"
#include "tools/tune/subject.h"

namespace flashpack::bench {

/// The medians of the samples of one policy.
struct PolicyCell {
  CachePolicy policy = CachePolicy::kAuto;
  int samples = 0;
  double gb_per_s = 0;
  double cpu_s_per_gb = 0;
};

/// "auto", "direct" or "buffered".
const char* to_string(CachePolicy policy);

/// Loads with `setting` and each policy in turns, at least three times and until the time is over. kAuto, which loads
/// have unless they say otherwise, is first in the result. Throws: Error; std::exception.
std::vector<PolicyCell> measure_policies(Subject& subject, const Setting& setting, Cached cached,
                                         Budget::Clock::time_point end);

/// The fastest, if it is more than kTolerance faster than kAuto; else kAuto. Requires: kAuto is first.
const PolicyCell& choose(const std::vector<PolicyCell>& cells);

}  // namespace flashpack::bench
