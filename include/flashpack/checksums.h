/// Checksums of a file's payload.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace flashpack {

/// CRC-32C (Castagnoli, RFC 3720 appendix B.4) of the first `size_bytes` bytes of a file, stripe by stripe: stripe i is
/// the bytes from i * kStripeBytes on; the last may be shorter.
struct Checksums {
  static constexpr std::uint32_t kStripeBytes = std::uint32_t{1} << 20;

  std::uint64_t size_bytes = 0;
  std::vector<std::uint32_t> crc32c;  ///< One per stripe.

  bool operator==(const Checksums&) const = default;
};

/// Whether a load holds what it reads against the file's checksums.
enum class Verify : std::uint8_t {
  kAuto,    ///< Where the file has them, what is read in whole stripes: all of a file, and most of a part of it.
  kAlways,  ///< All of it, reading up to a stripe more on either side of a part; a file without them is an error.
  kNever,
};

/// Of all of `bytes`.
std::uint32_t crc32c(std::span<const std::byte> bytes) noexcept;

}  // namespace flashpack
