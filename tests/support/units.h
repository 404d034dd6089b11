#pragma once

#include <cstdint>

namespace flashpack::testing {
inline constexpr std::uint32_t kMiB = 1u << 20;
}
