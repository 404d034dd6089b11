/// Memory for a file's tensors, laid out so that the engine can read it in place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "flashpack/checksums.h"
#include "flashpack/format.h"

namespace flashpack {

/// Wanted tensors that lie close together in the file: one extent, one region of memory.
struct Segment {
  std::uint64_t offset_bytes = 0;  ///< In the file.
  std::uint64_t size_bytes = 0;
  std::vector<std::size_t> records;  ///< Indices into Metadata::records, by offset.
};

/// Larger segments are cut between tensors, so that memory can go back to the system part by part.
inline constexpr std::uint64_t kMaxSegmentBytes = std::uint64_t{1} << 30;
/// Shorter unwanted stretches are read along: a second extent would cost more than the bytes do.
inline constexpr std::uint64_t kMaxGapBytes = std::uint64_t{1} << 20;

/// Groups the records at `wanted`, in any order. Empty tensors have no bytes and are in no segment. A segment takes in
/// the padding that follows it, because only whole stripes can be verified; with Verify::kAlways it reaches to the
/// borders of stripes.
std::vector<Segment> plan_segments(const Metadata& metadata, std::span<const std::size_t> wanted,
                                   Verify verify = Verify::kAuto, std::uint64_t max_segment_bytes = kMaxSegmentBytes);

/// An anonymous private mapping whose data() has the phase of a file offset: both agree modulo 4096, and modulo 2 MiB
/// from that size on. Zero until written; pages that nobody touches take no memory.
class HostRegion {
 public:
  /// Throws: Error (errno of mmap).
  HostRegion(std::uint64_t size_bytes, std::uint64_t offset_bytes);
  HostRegion(const HostRegion&) = delete;
  HostRegion& operator=(const HostRegion&) = delete;
  ~HostRegion();

  std::byte* data() const noexcept { return data_; }

 private:
  std::size_t mapped_bytes_;
  void* mapping_;
  std::byte* data_;
};

}  // namespace flashpack
