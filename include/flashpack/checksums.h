/// Checksums of a file's payload.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace flashpack {

/// CRC-32C (Castagnoli, RFC 3720 appendix B.4) of each stripe in the first `size_bytes` bytes of a file. Stripe i
/// begins at byte i * kStripeBytes and has kStripeBytes bytes; the last stripe may be shorter.
struct Checksums {
  static constexpr std::uint32_t kStripeBytes = std::uint32_t{1} << 20;
  /// The number of stripes in so many bytes.
  static constexpr std::uint64_t stripes_in(std::uint64_t size_bytes) noexcept {
    return size_bytes / kStripeBytes + (size_bytes % kStripeBytes != 0);
  }

  std::uint64_t size_bytes = 0;
  std::vector<std::uint32_t> crc32c;  ///< One per stripe.

  bool operator==(const Checksums&) const = default;
};

/// Whether a load compares the bytes that it reads with the file's checksums.
enum class Verify : std::uint8_t {
  kAuto,    ///< If the file has checksums, every stripe that is read whole is verified. A load of a part of a file may
            ///< read its first and last stripe only in part, which leaves those unverified.
  kAlways,  ///< All bytes are verified, for which a load of a part reads up to a stripe more at each end. A file
            ///< without checksums is an error.
  kNever,
};

/// CRC-32C of all of `bytes`, as one value. Any thread.
std::uint32_t crc32c(std::span<const std::byte> bytes) noexcept;

}  // namespace flashpack
