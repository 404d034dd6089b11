#pragma once

#include <string>
#include <vector>

#include "bench/support/tuning.h"

namespace flashpack::bench {

/// Draws speeds as a table: a line for each chunk size, a column for each queue depth, GB/s in the cells. The nearer a
/// cell is to the fastest, the brighter it is, or without `colours` the denser the character before its number. `*`
/// follows the number of `pick` and `d` that of the default, which is the first cell. A place without a number has not
/// been measured. Each line ends with a newline.
std::string heat_map(const std::vector<Cell>& cells, const Setting& pick, bool colours);

}  // namespace flashpack::bench
