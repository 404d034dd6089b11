/// Units of sizes.
#pragma once

#include <cstdint>

namespace flashpack::internal {

inline constexpr std::uint32_t kKiB = 1u << 10;
inline constexpr std::uint32_t kMiB = 1u << 20;

}  // namespace flashpack::internal
