#pragma once

#include <chrono>

namespace flashpack::testing {

/// What takes longer hangs: nothing that the tests do takes so long, even beside programs that keep the disk busy.
inline constexpr std::chrono::minutes kHang{2};

}  // namespace flashpack::testing
