/// How fast the disk is without the engine, by the least code, to tell whether it is what limits.
#pragma once

#include "tools/tune/budget.h"
#include "tools/tune/cell.h"
#include "tools/tune/subject.h"

namespace flashpack::bench {

/// GB/s of what a sample from the disk reads, with the chunks and the depth of `setting`: by io_uring, or by as many
/// threads where it is refused. The median of three, or of fewer when the time is over. Throws: std::system_error.
double plain_reads_gb_per_s(const Subject& subject, const Setting& setting, Budget::Clock::time_point end);

/// The same of durable writes of as much to a new file, in chunks of 4 MiB, 8 in flight, by io_uring. Throws:
/// std::system_error, also where it is refused.
double plain_writes_gb_per_s(const Subject& subject, Budget::Clock::time_point end);

}  // namespace flashpack::bench
