#pragma once

#include <chrono>

namespace flashpack::testing {

/// Keeps the thread busy for so long, to do something at a moment within what another thread does meanwhile. Calls of
/// std::this_thread::yield() are no measure of time: beside busy programs each of them may take milliseconds.
inline void spin(std::chrono::nanoseconds time) {
  const auto end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end) continue;
}

}  // namespace flashpack::testing
