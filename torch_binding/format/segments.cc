#include "torch_binding/format/segments.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <numeric>
#include <string>

namespace flashpack {

namespace {

constexpr std::uint64_t kPageBytes = 4096;
constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;

std::uint64_t round_up(std::uint64_t value, std::uint64_t granule) { return (value + granule - 1) & ~(granule - 1); }

// Huge pages only where they lie wholly inside: the ends would take memory that no tensor uses.
void advise_huge_pages(std::byte* data, std::uint64_t size_bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const auto first = round_up(begin, kHugePageBytes);
  const auto last = (begin + size_bytes) & ~(kHugePageBytes - 1);
  // A kernel without huge pages refuses; small pages serve as well, only slower.
  if (first < last) madvise(data + (first - begin), last - first, MADV_HUGEPAGE);
}

void widen(std::vector<Segment>& segments, const Metadata& metadata, Verify verify) {
  constexpr std::uint64_t kStripeBytes = Checksums::kStripeBytes;
  // A file may ask for any alignment; up to this one the least common multiple cannot overflow.
  constexpr std::uint64_t kMostBytes = std::uint64_t{1} << 32;
  const std::uint64_t align_bytes = std::clamp<std::uint64_t>(metadata.align_bytes, 1, kMostBytes);
  const std::uint64_t longest_padding_bytes = std::lcm(align_bytes, std::uint64_t{16}) - 1;
  std::uint64_t free = 0;
  for (std::size_t i = 0; i < segments.size(); ++i) {
    std::uint64_t begin = segments[i].offset_bytes;
    std::uint64_t end = begin + segments[i].size_bytes;
    const std::uint64_t limit = i + 1 < segments.size() ? segments[i + 1].offset_bytes : metadata.payload_bytes;
    if (verify == Verify::kAlways) {
      begin = std::max(free, begin / kStripeBytes * kStripeBytes);
      end = std::min(limit, round_up(end, kStripeBytes));
    }
    if (limit - end <= longest_padding_bytes) end = limit;
    segments[i].offset_bytes = begin;
    segments[i].size_bytes = end - begin;
    free = end;
  }
}

}  // namespace

std::vector<Segment> plan_segments(const Metadata& metadata, std::span<const std::size_t> wanted, Verify verify,
                                   std::uint64_t max_segment_bytes) {
  std::vector<std::size_t> order;
  std::ranges::copy_if(wanted, std::back_inserter(order),
                       [&](std::size_t i) { return metadata.size_bytes(metadata.records[i]) > 0; });
  std::ranges::sort(order, {}, [&](std::size_t i) { return metadata.offset_bytes(metadata.records[i]); });

  std::vector<Segment> segments;
  for (const std::size_t i : order) {
    const std::uint64_t begin = metadata.offset_bytes(metadata.records[i]);
    const std::uint64_t end = begin + metadata.size_bytes(metadata.records[i]);
    const std::uint64_t last_end = segments.empty() ? 0 : segments.back().offset_bytes + segments.back().size_bytes;
    const bool joins = !segments.empty() && begin <= last_end + kMaxGapBytes &&
                       end <= segments.back().offset_bytes + max_segment_bytes;
    if (!joins) segments.push_back({.offset_bytes = begin});
    Segment& segment = segments.back();
    segment.size_bytes = end - segment.offset_bytes;
    segment.records.push_back(i);
  }
  widen(segments, metadata, verify);
  return segments;
}

HostRegion::HostRegion(std::uint64_t size_bytes, std::uint64_t offset_bytes) {
  const std::uint64_t granule = size_bytes < kHugePageBytes ? kPageBytes : kHugePageBytes;
  mapped_bytes_ = size_bytes + 2 * granule;  // Room to move data() to its phase.
  mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) {
    throw Error({errno, std::generic_category()},
                "map " + std::to_string(mapped_bytes_) + " bytes of memory for tensors");
  }
  const auto begin = reinterpret_cast<std::uintptr_t>(mapping_);
  data_ = static_cast<std::byte*>(mapping_) + (round_up(begin, granule) - begin) + offset_bytes % granule;
  advise_huge_pages(data_, size_bytes);
}

HostRegion::~HostRegion() { munmap(mapping_, mapped_bytes_); }

}  // namespace flashpack
