/// Which of the measured settings is the best one, and whether it takes the place of the default. It is pure.
#pragma once

#include <cstddef>
#include <vector>

#include "tools/tune/cell.h"

namespace flashpack::bench {

/// At most this part of the speed is given up for less CPU or memory, and a gain below it is noise.
inline constexpr double kTolerance = 0.03;
/// So many busy cores are given up for less memory.
inline constexpr double kSpareCores = 0.1;
/// The number of pairs of turns that decide; in doubt, twice as many do.
inline constexpr std::size_t kEnoughPairs = 16;
/// One pair of so many may lose: 14 of 16 gain by chance in one of 480 trials, 28 of 32 in one of 100,000.
inline constexpr std::size_t kPairsForALoss = 8;
/// Beside such a gain of one way to read, the other may lose as much as is given up for less memory.
inline constexpr double kLargeGain = 0.25;

/// Chooses the default, if the fastest is not more than kTolerance faster. Else, of those that are within kTolerance of
/// the fastest and no slower than the default, and keep at most kSpareCores more cores busy than the one with the least
/// CPU, it chooses the one with the least staging memory, or the fewest bytes in flight where that is not given, then
/// with the fewest workers, then with the engine's own backend. Requires: the default is first.
const Cell& choose(const std::vector<Cell>& cells);

/// Whether pairs of turns show so far that a setting is faster than the default: the median gained more than
/// kTolerance, and no more than one of kPairsForALoss lost anything, where fewer than kEnoughPairs count as so many. A
/// median alone may gain so much by chance, on a busy machine, where pairs differ by more than kTolerance. `pairs` has
/// the speeds relative to the default: 1.1 for a tenth faster. Requires: not empty.
bool gains(const std::vector<double>& pairs);

/// Whether a setting takes the place of the default: it gains in one way to read, and in none does the median lose more
/// than half of kTolerance, so that doubt favours the default, or more than kTolerance beside a gain of kLargeGain,
/// which must not be lost to chance. `ratios` has the pairs of each way to read, which are kEnoughPairs of all ways or
/// more where one gains, because fewer may hide a loss. Requires: no way is without pairs.
bool is_better(const std::vector<std::vector<double>>& ratios);

}  // namespace flashpack::bench
