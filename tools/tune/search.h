/// Measures settings in rounds.
#pragma once

#include <vector>

#include "tools/tune/budget.h"
#include "tools/tune/cell.h"
#include "tools/tune/rounds.h"
#include "tools/tune/subject.h"

namespace flashpack::bench {

/// Measures rounds, the first one of `round`, until another would not change the choice or a share of the time is over.
/// Returns the settings that were measured, those of the first round first. Tells of each round on standard error.
/// Throws: Error.
std::vector<Cell> search(Subject& subject, std::vector<Setting> round, const Neighbours& neighbours, Work work,
                         const Budget& budget, double share);

}  // namespace flashpack::bench
