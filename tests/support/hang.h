#pragma once

#include <chrono>

namespace flashpack::testing {

/// What takes longer hangs. A direct read of 16 MiB that were just written takes half a minute where other programs
/// keep the disk busy, because the kernel writes them first.
inline constexpr std::chrono::minutes kHang{2};

}  // namespace flashpack::testing
