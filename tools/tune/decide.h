/// Decides in the end between what was found and the default.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "tools/tune/budget.h"
#include "tools/tune/cell.h"
#include "tools/tune/report.h"
#include "tools/tune/subject.h"

namespace flashpack::bench {

/// The settings to measure in turns with the default, which is none of them. In this order:
///   - the pick;
///   - the best setting with the chunk size and queue depth that the disk asked for;
///   - that which the disk alone asked for, because workers or slots may be why the others are no better;
///   - the best setting with the usual backend, if the disk asked for another;
///   - the best setting with the usual chunk size, if the disk asked for another, which may be why the page cache
///   loses.
/// It is pure.
std::vector<Setting> candidates_of(const Report& report, const Setting& of_the_disk);

/// Measures a candidate in turns with the default, and returns its speeds relative to that, of each way to read. It
/// takes seven pairs at least. A candidate that gains so far in one way gets kEnoughPairs of all ways, even when the
/// time is over, because few pairs seldom show a gain beyond doubt, and may hide a loss; and twice as many, if another
/// way then loses so little that it may be by chance. It is not asked in between whether the loss has become small
/// enough, because chance would say so sooner or later: if pairs differ by 8 %, of settings that lose 5 % in one way
/// one in twelve passes beside a small gain, and one in four beside a large one. The ways take turns, too, so that an
/// hour at which the disk is busy does not meet one of them only. `pair_of` measures the pair of a number, from 0 on.
std::vector<std::vector<double>> in_turns(std::size_t ways,
                                          const std::function<double(std::size_t way, int pair)>& pair_of,
                                          const std::function<bool()>& is_over);

/// Measures candidates in turns with the default, until one of them is better. The first two get their turns however
/// little time is left. Needs the tables and the pick of `report`, and puts there what came out. Throws: Error.
void decide(Report& report, Subject& subject, const Setting& of_the_disk, Budget::Clock::time_point end);

}  // namespace flashpack::bench
