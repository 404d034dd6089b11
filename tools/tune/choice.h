/// Which of the measured settings is the best one, and whether it takes the place of the default. It is pure.
#pragma once

#include <vector>

#include "tools/tune/cell.h"

namespace flashpack::bench {

/// At most this part of the speed is given up for less CPU or memory, and a gain below it is noise.
inline constexpr double kTolerance = 0.03;
/// Costs are compared in whole steps of this.
inline constexpr double kCpuStepSPerGb = 0.01;

/// Chooses the default, if the fastest is not more than kTolerance faster. Else, of those that are within kTolerance of
/// the fastest and no slower than the default, it chooses the one with the least CPU, in steps, then with the least
/// staging memory, or the fewest bytes in flight where that is not given, then with the fewest workers, then with the
/// engine's own backend. Requires: the default is first.
const Cell& choose(const std::vector<Cell>& cells);

/// Whether a setting takes the place of the default: somewhere the median gained more than kTolerance and seven eighths
/// of the pairs gained anything, and nowhere did the median lose as much and three quarters of the pairs lose anything.
/// A median alone may gain so much by chance, on a busy machine, where pairs differ by more than kTolerance. With
/// sixteen pairs, which decide() takes of what gains in the median, two may lose: 14 gain by chance in one of 480
/// trials. `ratios` has, for each way to read, the speeds relative to the default of pairs that were measured in
/// turns: 1.1 for a tenth faster.
bool is_better(std::vector<std::vector<double>> ratios);

}  // namespace flashpack::bench
