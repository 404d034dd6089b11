/// Objects that live as long as the process.
///
/// Thread safety: any thread may call the function.
#pragma once

#include <cstddef>
#include <new>

namespace flashpack::internal {

/// Returns the only T of this process, which is made at the first call and never destroyed, because a static engine may
/// end after all other static objects, and make errors and free memory even then.
template <typename T>
T& immortal() {
  alignas(T) static std::byte memory[sizeof(T)];
  static T* const one = new (memory) T;
  return *one;
}

}  // namespace flashpack::internal
