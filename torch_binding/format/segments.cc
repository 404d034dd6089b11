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

// On a device, smaller tensors do not share segments with larger ones. It is the limit below which torch itself takes
// small blocks of CUDA's memory.
constexpr std::uint64_t kSmallBytes = std::uint64_t{1} << 20;
// torch takes CUDA's memory for small tensors in blocks of this size, and keeps a block while any of its tensors is
// left.
constexpr std::uint64_t kSmallBlockBytes = std::uint64_t{2} << 20;
// On a device a segment has less padding than this between two tensors, because padding takes memory that nobody uses.
// A bound, and not tuned.
constexpr std::uint64_t kMaxDevicePaddingBytes = 4096;

class Planner {
 public:
  Planner(const Metadata& metadata, std::span<const std::size_t> wanted, Device::Kind kind,
          std::uint64_t max_segment_bytes)
      : metadata_(metadata), wanted_(wanted), on_device_(kind != Device::Kind::kHost), max_bytes_(max_segment_bytes) {}

  SegmentPlan run(Verify verify) {
    group();
    widen(verify);
    place();
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
    for (const std::size_t i : order) {
      const TensorRecord& next = record(i);
      if (plan_.segments.empty() || !joins(next)) {
        plan_.segments.push_back({.offset_bytes = next.offset_bytes});
        kinds_.push_back(
            {.is_small = is_small(next), .is_shifted = !on_device_ && !is_aligned(next, next.offset_bytes)});
      }
      Segment& segment = plan_.segments.back();
      const std::uint64_t begin = next.offset_bytes - segment.offset_bytes;
      segment.size_bytes = begin + next.size_bytes;
      plan_.places[i] = {.segment = plan_.segments.size() - 1, .offset_bytes = begin};
    }
  }

  // Whether `next` can go to the last segment.
  bool joins(const TensorRecord& next) const {
    const Segment& last = plan_.segments.back();
    const Kind& kind = kinds_.back();
    const std::uint64_t begin = next.offset_bytes - last.offset_bytes;
    assert(begin >= last.size_bytes && "records do not overlap, and none is wanted twice");
    const std::uint64_t gap_bytes = begin - last.size_bytes;
    const std::uint64_t end = begin + next.size_bytes;
    if (!on_device_) {
      return gap_bytes <= kMaxUnwantedBytes && end <= max_bytes_ &&
             is_aligned(next, kind.is_shifted ? begin : next.offset_bytes);
    }
    return kind.is_small == is_small(next) && gap_bytes < kMaxDevicePaddingBytes && begin % kDeviceAlignBytes == 0 &&
           end <= (kind.is_small ? kSmallBlockBytes : max_bytes_);
  }

  static bool is_small(const TensorRecord& record) { return record.size_bytes < kSmallBytes; }
  static bool is_aligned(const TensorRecord& record, std::uint64_t offset_bytes) {
    return offset_bytes % element_bytes(record.dtype) == 0;
  }

  // Extends segments over padding and, if all is to be verified, to the borders of stripes.
  void widen(Verify verify) {
    constexpr std::uint64_t kStripeBytes = Checksums::kStripeBytes;
    // A file may have any alignment; the least common multiple cannot overflow for alignments up to this.
    constexpr std::uint64_t kMostBytes = std::uint64_t{1} << 32;
    const std::uint64_t align_bytes = std::clamp<std::uint64_t>(metadata_.container.align_bytes, 1, kMostBytes);
    const std::uint64_t longest_padding_bytes = std::lcm(align_bytes, std::uint64_t{16}) - 1;
    std::vector<Segment>& segments = plan_.segments;
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
      kinds_[i].lead_bytes = segments[i].offset_bytes - begin;
      segments[i].offset_bytes = begin;
      segments[i].size_bytes = end - begin;
      free = end;
    }
    for (SegmentPlan::Place& place : plan_.places) {
      if (place.segment != SegmentPlan::Place::kNowhere) place.offset_bytes += kinds_[place.segment].lead_bytes;
    }
  }

  // On the host, segments that are not shifted get blocks of their own, which can be read in place. If a file has
  // shifted segments, only the larger unshifted ones get a block of their own, because a process may have only so many
  // mappings.
  void place() {
    const bool any_shifted = std::ranges::any_of(kinds_, &Kind::is_shifted);
    for (std::size_t i = 0; i < plan_.segments.size(); ++i) {
      Segment& segment = plan_.segments[i];
      const bool by_first = on_device_ || kinds_[i].is_shifted;
      if (by_first || (any_shifted && segment.size_bytes <= kSmallBlockBytes)) {
        // A shifted or device segment is placed so that its first tensor is aligned; others keep their offset in the
        // file.
        place_in_shared_block(segment, by_first ? -kinds_[i].lead_bytes : segment.offset_bytes);
      } else {
        segment.block = plan_.blocks.size();
        plan_.blocks.push_back({.size_bytes = segment.size_bytes, .phase_bytes = segment.offset_bytes});
      }
    }
  }

  // The segment begins at `phase_bytes`, modulo kDeviceAlignBytes.
  void place_in_shared_block(Segment& segment, std::uint64_t phase_bytes) {
    const bool is_small = segment.size_bytes <= kSmallBlockBytes;
    std::size_t& last = is_small ? last_small_ : last_large_;
    const std::uint64_t skip_bytes = phase_bytes % kDeviceAlignBytes;
    if (last != kNone) segment.block_offset = round_up(plan_.blocks[last].size_bytes, kDeviceAlignBytes) + skip_bytes;
    if (last == kNone || segment.block_offset + segment.size_bytes > (is_small ? kSmallBlockBytes : max_bytes_)) {
      last = plan_.blocks.size();
      plan_.blocks.push_back({});
      segment.block_offset = skip_bytes;
    }
    segment.block = last;
    plan_.blocks[last].size_bytes = segment.block_offset + segment.size_bytes;
  }

  static constexpr std::size_t kNone = ~std::size_t{0};

  // The facts about a segment while it is planned.
  struct Kind {
    bool is_small = false;         // Its tensors are small.
    bool is_shifted = false;       // Its tensors are at no multiples of their element size in the file.
    std::uint64_t lead_bytes = 0;  // Its bytes before its first tensor.
  };

  const Metadata& metadata_;
  const std::span<const std::size_t> wanted_;
  const bool on_device_;
  const std::uint64_t max_bytes_;
  SegmentPlan plan_;
  std::vector<Kind> kinds_;         // One for each segment.
  std::size_t last_small_ = kNone;  // The block that is being filled with small segments.
  std::size_t last_large_ = kNone;  // The one that is being filled with larger segments.
};

}  // namespace

SegmentPlan plan_segments(const Metadata& metadata, std::span<const std::size_t> wanted, Device::Kind kind,
                          Verify verify, std::uint64_t max_segment_bytes) {
  return Planner(metadata, wanted, kind, max_segment_bytes).run(verify);
}

SegmentPlan plan_segments(const Checkpoint& checkpoint, std::span<const std::size_t> wanted, Device::Kind kind,
                          Verify verify, std::uint64_t max_segment_bytes) {
  SegmentPlan whole;
  whole.places.resize(wanted.size());
  std::vector<std::vector<std::size_t>> records(checkpoint.files().size());
  std::vector<std::vector<std::size_t>> numbers(checkpoint.files().size());  // Where `wanted` has these records.
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    records[checkpoint.file_of(wanted[i])].push_back(checkpoint.record_of(wanted[i]));
    numbers[checkpoint.file_of(wanted[i])].push_back(i);
  }
  for (std::size_t file = 0; file < records.size(); ++file) {
    const Metadata& metadata = checkpoint.files()[file].metadata;
    SegmentPlan part = plan_segments(metadata, records[file], kind, verify, max_segment_bytes);
    for (std::size_t i = 0; i < part.places.size(); ++i) {
      SegmentPlan::Place& place = whole.places[numbers[file][i]] = part.places[i];
      if (place.segment != SegmentPlan::Place::kNowhere) place.segment += whole.segments.size();
    }
    for (Segment& segment : part.segments) {
      segment.file = file;
      segment.block += whole.blocks.size();
    }
    whole.segments.insert(whole.segments.end(), part.segments.begin(), part.segments.end());
    whole.blocks.insert(whole.blocks.end(), part.blocks.begin(), part.blocks.end());
  }
  return whole;
}

std::vector<std::vector<Extent>> SegmentPlan::extents(std::span<std::byte* const> addresses,
                                                      std::size_t file_count) const {
  std::vector<std::vector<Extent>> extents(file_count);
  for (const Segment& segment : segments) {
    extents[segment.file].push_back(
        {segment.offset_bytes, segment.size_bytes, addresses[segment.block] + segment.block_offset});
  }
  return extents;
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
