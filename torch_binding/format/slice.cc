#include "flashpack/slice.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>

#include "engine/ground/error.h"

namespace flashpack {

namespace {

std::uint64_t length_of(const IndexRange& range) { return static_cast<std::uint64_t>(range.end - range.begin); }

void check(const TensorRecord& record, std::span<const IndexRange> ranges) {
  const auto refuse = [&](const std::string& what) {
    throw internal::argument_error("slice " + record.name + ": " + what);
  };
  if (ranges.size() != record.shape.size())
    refuse(std::to_string(ranges.size()) + " ranges for " + std::to_string(record.shape.size()) + " dims");
  for (std::size_t dim = 0; dim < ranges.size(); ++dim) {
    const auto [begin, end] = ranges[dim];
    if (begin < 0 || begin > end || end > record.shape[dim])
      refuse("from " + std::to_string(begin) + " to " + std::to_string(end) + " of a dim of " +
             std::to_string(record.shape[dim]));
  }
}

/// Repeats what is in `extents` `count` times, `stride_bytes` apart in the file and `block_bytes` apart in memory.
std::vector<Extent> repeated(const std::vector<Extent>& extents, std::uint64_t count, std::uint64_t stride_bytes,
                             std::uint64_t block_bytes) {
  std::vector<Extent> all;
  all.reserve(extents.size() * count);
  for (std::uint64_t i = 0; i < count; ++i) {
    for (const Extent& extent : extents)
      all.push_back({extent.offset_bytes + i * stride_bytes, extent.size_bytes,
                     static_cast<std::byte*>(extent.target) + i * block_bytes});
  }
  return all;
}

}  // namespace

std::vector<Extent> slice_extents(const TensorRecord& record, std::span<const IndexRange> ranges, void* target) {
  check(record, ranges);
  // A tensor without elements may have other dims that are huge.
  if (std::ranges::any_of(ranges, [](const IndexRange& range) { return length_of(range) == 0; })) return {};
  std::uint64_t stride_bytes = element_bytes(record.dtype);  // From one index of the dim to the next.
  std::uint64_t slice_bytes = stride_bytes;                  // The bytes of a slice of the dims seen so far.
  std::vector<Extent> extents = {{record.offset_bytes, slice_bytes, target}};
  for (std::size_t dim = ranges.size(); dim-- > 0;) {
    const std::uint64_t length = length_of(ranges[dim]);
    if (slice_bytes == stride_bytes) {  // All that is within the dim is one extent.
      extents.front().size_bytes = length * stride_bytes;
    } else {
      extents = repeated(extents, length, stride_bytes, slice_bytes);
    }
    for (Extent& extent : extents) extent.offset_bytes += static_cast<std::uint64_t>(ranges[dim].begin) * stride_bytes;
    slice_bytes *= length;
    stride_bytes *= static_cast<std::uint64_t>(record.shape[dim]);
  }
  return extents;
}

}  // namespace flashpack
