#pragma once

namespace flashpack::testing {

/// Whether what the calling thread allocates from here on is counted.
void count_allocations(bool on);
/// Whether what any thread allocates from here on is counted.
void count_allocations_of_all(bool on);
int counted_allocations();

/// While one lives, what its thread allocates is not counted, because a stand-in for the kernel or a device does it.
class NotCounted {
 public:
  NotCounted() { ++depth; }
  ~NotCounted() { --depth; }
  NotCounted(const NotCounted&) = delete;
  NotCounted& operator=(const NotCounted&) = delete;

  static inline thread_local int depth = 0;
};

}  // namespace flashpack::testing
