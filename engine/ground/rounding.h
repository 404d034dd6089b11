/// The sizes of pages that plans count in, and rounding to them and to other powers of two.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <cstdint>

namespace flashpack::internal {

/// Reads in place are of whole pages, so that the kernel writes to no page that others use.
inline constexpr std::uint32_t kPageBytes = 4096;
inline constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;

constexpr std::uint64_t round_down(std::uint64_t value, std::uint64_t power_of_two) {
  return value & ~(power_of_two - 1);
}
constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t power_of_two) {
  return round_down(value + power_of_two - 1, power_of_two);
}

}  // namespace flashpack::internal
