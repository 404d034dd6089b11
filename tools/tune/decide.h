/// Decides in the end between what was found and the default.
#pragma once

#include "tools/tune/budget.h"
#include "tools/tune/cell.h"
#include "tools/tune/report.h"
#include "tools/tune/subject.h"

namespace flashpack::bench {

/// Measures candidates in turns with the default, until one of them is better. The first two get their turns however
/// little time is left. Needs the tables and the pick of `report`, and puts there what came out. Throws: Error.
void decide(Report& report, Subject& subject, const Setting& of_the_disk, Budget::Clock::time_point end);

}  // namespace flashpack::bench
