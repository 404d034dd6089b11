#pragma once

namespace flashpack::testing {

/// Whether what the calling thread allocates from here on is counted.
void count_allocations(bool on);
int counted_allocations();

}  // namespace flashpack::testing
