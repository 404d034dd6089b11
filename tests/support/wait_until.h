#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <source_location>
#include <thread>

#include "tests/support/hang.h"

namespace flashpack::testing {

/// Waits until `condition()` is true. If that takes longer than kHang, the test has failed and goes on, so that it lets
/// go of what it holds.
template <typename Condition>
void wait_until(Condition condition, std::source_location where = std::source_location::current()) {
  const auto deadline = std::chrono::steady_clock::now() + kHang;
  while (!condition()) {
    if (std::chrono::steady_clock::now() >= deadline) {
      ADD_FAILURE_AT(where.file_name(), static_cast<int>(where.line())) << "this has been waited for in vain";
      return;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));  // Others are to get there.
  }
}

}  // namespace flashpack::testing
