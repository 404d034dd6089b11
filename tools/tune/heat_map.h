#pragma once

#include <string>
#include <vector>

#include "tools/tune/cell.h"

namespace flashpack::bench {

/// The columns of a map stand for values of this option of an engine.
enum class Columns { kQueueDepth, kStaging };

/// Draws speeds as a table: a line for each chunk size, a column for each queue depth or staging memory in MiB, GB/s in
/// the cells. The nearer a cell is to the fastest, the brighter it is, or without `colours` the denser the character
/// before its number. `*` follows the number of `pick` and `d` that of the first cell, with which others are compared;
/// by queue depth that is the default. Of settings that share a place, one of these is shown, else the fastest. A place
/// without a number has not been measured. Each line ends with a newline.
std::string heat_map(const std::vector<Cell>& cells, const Setting& pick, bool colours,
                     Columns columns = Columns::kQueueDepth);

}  // namespace flashpack::bench
