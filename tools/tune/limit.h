/// Says which part of the machine kept loads from being faster. It is pure.
#pragma once

#include <string>

#include "tools/tune/cell.h"

namespace flashpack::bench {

/// Speeds in GB/s that no load can exceed, 0 where that is not known or does not matter.
struct Ceilings {
  double link = 0;    ///< Copies to a GPU.
  double copies = 0;  ///< Plain copies from memory to memory by all cores.
  double disk = 0;    ///< Plain reads of the disk, or writes.
  const char* plain = "reads";
  double cores = 1;  ///< CPUs that the process may keep busy.
};

/// Says what kept the best setting from being faster. That is `otherwise` where the cell is near to no ceiling, unless
/// the disk was measured, which then was not it.
std::string limit_of(const Cell& best, const char* otherwise, const Ceilings& ceilings);

}  // namespace flashpack::bench
