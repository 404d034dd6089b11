/// Checksums that are put together from parts, in whatever order the bytes pass.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "flashpack/checksums.h"

namespace flashpack::internal {

/// The stripes of a range of a file. A CRC is linear: that of a stripe is the sum (exclusive or) of what each part of
/// it adds in its place, so parts may come from any thread in any order, and bytes that are zero need not come at all.
class StripeSums {
 public:
  StripeSums() = default;
  /// The stripes that the bytes from `begin_bytes` to `end_bytes` lie in.
  StripeSums(std::uint64_t begin_bytes, std::uint64_t end_bytes);

  /// Counts `bytes`, which lie at `offset_bytes` in the file; those in other stripes, or past the end of the range, are
  /// passed over.
  /// Thread safety: any thread, with other add() at the same time. Everything else needs the object to itself.
  void add(std::uint64_t offset_bytes, std::span<const std::byte> bytes) noexcept;
  /// Counts what `other` has counted, which may have another range: this one's grows.
  void add(const StripeSums& other);

  /// Of stripe `index` of the file, whose size is `size_bytes`.
  std::uint32_t crc32c(std::uint64_t index, std::uint32_t size_bytes) const noexcept;
  /// How many bytes of stripe `index` have been counted.
  std::uint32_t counted_bytes(std::uint64_t index) const noexcept;

 private:
  struct Stripe {
    std::atomic<std::uint32_t> sum = 0;  // As if zeros followed up to a whole stripe, without the CRC's inversions.
    std::atomic<std::uint32_t> counted_bytes = 0;
  };

  const Stripe* find(std::uint64_t index) const noexcept;
  void grow(std::uint64_t first, std::uint64_t end);

  std::uint64_t first_ = 0;  // Index in the file of stripes_[0].
  std::uint64_t end_ = 0;
  std::uint64_t end_bytes_ = 0;
  std::unique_ptr<Stripe[]> stripes_;
};

}  // namespace flashpack::internal
