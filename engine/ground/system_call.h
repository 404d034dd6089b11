/// Makes system calls that signals interrupt.
///
/// Thread safety: any thread may call the function.
#pragma once

#include <cerrno>

namespace flashpack::internal {

/// Makes a system call, which returns a negative number for an error, again as often as a signal interrupts it.
template <typename Call>
auto uninterrupted(Call call) {
  for (;;) {
    const auto result = call();
    if (result >= 0 || errno != EINTR) return result;
  }
}

}  // namespace flashpack::internal
