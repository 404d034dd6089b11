#include "torch_binding/format/segments.h"

#include <algorithm>
#include <cassert>
#include <numeric>
#include <string>
#include <utility>

#include "engine/ground/pages.h"

namespace flashpack {

namespace {

using internal::round_up;

// On a device, smaller tensors do not share segments with larger ones.
constexpr std::uint64_t kSmallBytes = std::uint64_t{1} << 20;
// torch takes CUDA's memory for small tensors in blocks of this size, and keeps a block while any of its tensors is
// left.
constexpr std::uint64_t kSmallBlockBytes = std::uint64_t{2} << 20;
// On a device a segment has less padding than this between two tensors, because padding takes memory that nobody uses.
constexpr std::uint64_t kMaxDevicePaddingBytes = 4096;

class Planner {
 public:
  Planner(const Metadata& metadata, std::span<const std::size_t> wanted, Device::Kind kind,
          std::uint64_t max_segment_bytes)
      : metadata_(metadata), wanted_(wanted), on_device_(kind != Device::Kind::kHost), max_bytes_(max_segment_bytes) {}

  SegmentPlan run(Verify verify) {
    group();
    widen(verify);
    if (on_device_) {
      place_in_shared_blocks();
    } else {
      place_in_blocks_of_their_own();
    }
    return std::move(plan_);
  }

 private:
  const TensorRecord& record(std::size_t i) const {
    assert(wanted_[i] < metadata_.records.size());
    return metadata_.records[wanted_[i]];
  }

  // Groups the tensors, by offset in the file, into segments that begin and end with a tensor.
  void group() {
    std::vector<std::size_t> order;
    for (std::size_t i = 0; i < wanted_.size(); ++i) {
      if (record(i).size_bytes > 0) order.push_back(i);
    }
    std::ranges::sort(order, {}, [&](std::size_t i) { return record(i).offset_bytes; });
    plan_.places.resize(wanted_.size());
    bool is_small = false;
    for (const std::size_t i : order) {
      const TensorRecord& next = record(i);
      if (plan_.segments.empty() || !joins(next, is_small)) {
        plan_.segments.push_back({.offset_bytes = next.offset_bytes});
        is_small = next.size_bytes < kSmallBytes;
      }
      Segment& segment = plan_.segments.back();
      const std::uint64_t begin = next.offset_bytes - segment.offset_bytes;
      segment.size_bytes = begin + next.size_bytes;
      plan_.places[i] = {.segment = plan_.segments.size() - 1, .offset_bytes = begin};
    }
  }

  // Whether `next` can go to the last segment; `is_small` says whether that segment's tensors are small.
  bool joins(const TensorRecord& next, bool is_small) const {
    const Segment& last = plan_.segments.back();
    const std::uint64_t begin = next.offset_bytes - last.offset_bytes;
    assert(begin >= last.size_bytes && "records do not overlap, and none is wanted twice");
    const std::uint64_t gap_bytes = begin - last.size_bytes;
    const std::uint64_t end = begin + next.size_bytes;
    if (!on_device_) return gap_bytes <= kMaxGapBytes && end <= max_bytes_;
    return is_small == (next.size_bytes < kSmallBytes) && gap_bytes < kMaxDevicePaddingBytes &&
           begin % kDeviceAlignBytes == 0 && end <= (is_small ? kSmallBlockBytes : max_bytes_);
  }

  // Extends segments over padding and, if all is to be verified, to the borders of stripes.
  void widen(Verify verify) {
    constexpr std::uint64_t kStripeBytes = Checksums::kStripeBytes;
    // A file may have any alignment; the least common multiple cannot overflow for alignments up to this.
    constexpr std::uint64_t kMostBytes = std::uint64_t{1} << 32;
    const std::uint64_t align_bytes = std::clamp<std::uint64_t>(metadata_.container.align_bytes, 1, kMostBytes);
    const std::uint64_t longest_padding_bytes = std::lcm(align_bytes, std::uint64_t{16}) - 1;
    std::vector<Segment>& segments = plan_.segments;
    leads_.resize(segments.size());
    std::uint64_t free = 0;
    for (std::size_t i = 0; i < segments.size(); ++i) {
      std::uint64_t begin = segments[i].offset_bytes;
      std::uint64_t end = begin + segments[i].size_bytes;
      const std::uint64_t limit = i + 1 < segments.size() ? segments[i + 1].offset_bytes : metadata_.payload_bytes;
      assert(end <= limit);
      if (verify == Verify::kAlways) {
        begin = std::max(free, begin / kStripeBytes * kStripeBytes);
        end = std::min(limit, round_up(end, kStripeBytes));
      }
      if (limit - end <= longest_padding_bytes) end = limit;
      leads_[i] = segments[i].offset_bytes - begin;
      segments[i].offset_bytes = begin;
      segments[i].size_bytes = end - begin;
      free = end;
    }
    for (SegmentPlan::Place& place : plan_.places) {
      if (place.segment != SegmentPlan::Place::kNowhere) place.offset_bytes += leads_[place.segment];
    }
  }

  void place_in_blocks_of_their_own() {
    for (Segment& segment : plan_.segments) {
      segment.block = plan_.blocks.size();
      plan_.blocks.push_back({.size_bytes = segment.size_bytes, .offset_bytes = segment.offset_bytes});
    }
  }

  void place_in_shared_blocks() {
    constexpr std::size_t kNone = ~std::size_t{0};
    std::size_t last_small = kNone;
    std::size_t last_large = kNone;
    for (std::size_t i = 0; i < plan_.segments.size(); ++i) {
      Segment& segment = plan_.segments[i];
      const bool is_small = segment.size_bytes <= kSmallBlockBytes;
      std::size_t& last = is_small ? last_small : last_large;
      // The segment begins so that its first tensor is aligned.
      const std::uint64_t skip_bytes = round_up(leads_[i], kDeviceAlignBytes) - leads_[i];
      if (last != kNone) segment.block_offset = round_up(plan_.blocks[last].size_bytes, kDeviceAlignBytes) + skip_bytes;
      if (last == kNone || segment.block_offset + segment.size_bytes > (is_small ? kSmallBlockBytes : max_bytes_)) {
        last = plan_.blocks.size();
        plan_.blocks.push_back({.offset_bytes = segment.offset_bytes});
        segment.block_offset = skip_bytes;
      }
      segment.block = last;
      assert((segment.block_offset + leads_[i]) % kDeviceAlignBytes == 0);
      plan_.blocks[last].size_bytes = segment.block_offset + segment.size_bytes;
    }
  }

  const Metadata& metadata_;
  const std::span<const std::size_t> wanted_;
  const bool on_device_;
  const std::uint64_t max_bytes_;
  SegmentPlan plan_;
  std::vector<std::uint64_t> leads_;  // For each segment, its bytes before its first tensor.
};

}  // namespace

SegmentPlan plan_segments(const Metadata& metadata, std::span<const std::size_t> wanted, Device::Kind kind,
                          Verify verify, std::uint64_t max_segment_bytes) {
  return Planner(metadata, wanted, kind, max_segment_bytes).run(verify);
}

Metadata macroblocks_as_records(const Metadata& metadata) {
  Metadata blocks{.payload_bytes = metadata.payload_bytes,
                  .container = {.align_bytes = metadata.container.align_bytes}};
  for (const Macroblock& macroblock : metadata.container.macroblocks) {
    blocks.records.push_back({.name = "macroblock " + std::to_string(blocks.records.size()),
                              .dtype = macroblock.dtype,
                              .shape = {static_cast<std::int64_t>(macroblock.length_elems)},
                              .offset_bytes = macroblock.offset_bytes,
                              .size_bytes = macroblock.length_bytes});
  }
  return blocks;
}

}  // namespace flashpack
