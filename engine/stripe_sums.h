/// Checksums that are computed from parts, in any order.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>

#include "flashpack/checksums.h"

namespace flashpack::internal {

/// The checksums of the stripes in a range of a file. A CRC is linear: the CRC of a stripe is the sum (exclusive or) of
/// one value for each part of it. So parts may come from any thread in any order, and zero bytes may be left out.
class StripeSums {
 public:
  StripeSums() = default;
  /// The stripes that the bytes from `begin_bytes` to `end_bytes` lie in.
  StripeSums(std::uint64_t begin_bytes, std::uint64_t end_bytes);

  /// Counts `bytes`, which lie at `offset_bytes` in the file. Bytes outside the range's stripes or past its end are
  /// skipped. Thread safety: any number of threads may call this and take_back() at a time. crc32c() and
  /// counted_bytes() may be called while no thread counts in the stripes that they are asked about, first() and end()
  /// at any time; other members need the object to themselves.
  void add(std::uint64_t offset_bytes, std::span<const std::byte> bytes) noexcept {
    count(offset_bytes, bytes, Change::kAdd);
  }
  /// Undoes add() for the same bytes, which may have been added in other parts.
  void take_back(std::uint64_t offset_bytes, std::span<const std::byte> bytes) noexcept {
    count(offset_bytes, bytes, Change::kTakeBack);
  }
  /// Adds all that `other` has counted. If `other` has another range, this one's range grows.
  void add(const StripeSums& other);

  /// The checksum of stripe `index` of the file, if that stripe has `size_bytes` bytes.
  std::uint32_t crc32c(std::uint64_t index, std::uint32_t size_bytes) const noexcept;
  /// The indices in the file of the stripes in the range: from first() on and below end().
  std::uint64_t first() const noexcept { return first_; }
  std::uint64_t end() const noexcept { return end_; }
  /// The number of bytes of stripe `index` that have been counted.
  std::uint32_t counted_bytes(std::uint64_t index) const noexcept;

 private:
  struct Stripe {
    // Without the inversions of a CRC-32C, and with zeros for bytes that are not counted.
    std::atomic<std::uint32_t> sum = 0;
    std::atomic<std::uint32_t> counted_bytes = 0;
  };

  enum class Change : std::uint8_t { kAdd, kTakeBack };
  void count(std::uint64_t offset_bytes, std::span<const std::byte> bytes, Change change) noexcept;
  const Stripe* find(std::uint64_t index) const noexcept;
  void grow(std::uint64_t first, std::uint64_t end);

  std::uint64_t first_ = 0;  // Index in the file of stripes_[0].
  std::uint64_t end_ = 0;
  std::uint64_t end_bytes_ = 0;
  std::deque<Stripe> stripes_;  // It grows at both ends without moving what is there.
};

}  // namespace flashpack::internal
