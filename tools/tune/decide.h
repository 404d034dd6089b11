/// Decides in the end between what was found and the default.
#pragma once

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
///   - the best setting with the usual backend, if the disk asked for another.
/// It is pure.
std::vector<Setting> candidates_of(const Report& report, const Setting& of_the_disk);

/// Measures candidates in turns with the default, until one of them is better. The first two get their turns however
/// little time is left. Needs the tables and the pick of `report`, and puts there what came out. Throws: Error.
void decide(Report& report, Subject& subject, const Setting& of_the_disk, Budget::Clock::time_point end);

}  // namespace flashpack::bench
