// The global operator new of a test program, which counts.
#include "tests/support/counted_new.h"
#include "tests/support/sanitizers.h"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace {

thread_local bool counting = false;
std::atomic<bool> counting_all = false;
std::atomic<int> allocations = 0;

}  // namespace

namespace flashpack::testing {

void count_allocations(bool on) { counting = on; }
void count_allocations_of_all(bool on) { counting_all = on; }
int counted_allocations() { return allocations; }

}  // namespace flashpack::testing

// The sanitizers bring operators of their own, which must not be mixed with these.
#if !FLASHPACK_ASAN && !FLASHPACK_TSAN
void* operator new(std::size_t size) {
  if ((counting || counting_all) && flashpack::testing::NotCounted::depth == 0) ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
#endif
