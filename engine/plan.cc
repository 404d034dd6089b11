#include "engine/plan.h"

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <utility>

namespace flashpack::internal {

namespace {

// Beside others, an extent in place takes up to three operations where one read of all and a copy from a slot would do.
// At 64 KiB both ways take the same time, and in place saves 3 us of a CPU; from 128 KiB on it saves 11 us or more,
// which is worth two operations (engine_bench, cost/in_place_*).
constexpr std::uint64_t kMinInPlaceBytes = std::uint64_t{128} << 10;

// Neighbours of this size with a gap between them have a read each if they need no slot, because a disk of 2 GB/s reads
// both in the time that it takes for one of their sum, without the gap, and nothing is copied. Smaller ones share a
// read, which halves the operations, and so do those without a gap, of which a long run is read in large operations
// (engine_bench, load/cold/random_64_kib, load/cold/run_of_64_kib and cost/gap_16_kib).
constexpr std::uint64_t kMinOwnReadBytes = std::uint64_t{64} << 10;

// Up to this many unwanted bytes are read, because that costs less CPU time than a second read, and one operation, of
// which some disks allow few in a second. A disk of 2 GB/s pays for it with 24 us at this size, and at 16 KiB both take
// the same time (engine_bench, cost/gap_*).
constexpr std::uint64_t kMaxGapBytes = std::uint64_t{64} << 10;

bool same_phase(const Fragment& fragment, std::uint32_t align_bytes) {
  return ((reinterpret_cast<std::uintptr_t>(fragment.memory) ^ fragment.offset_bytes) & (align_bytes - 1)) == 0;
}

Fragment take_front(Fragment& fragment, std::uint64_t size_bytes) {
  assert(size_bytes <= fragment.size_bytes);
  Fragment front = fragment;
  front.size_bytes = size_bytes;
  fragment.offset_bytes += size_bytes;
  fragment.size_bytes -= size_bytes;
  fragment.memory += size_bytes;
  return front;
}

// Sorts by priority, the extents of the host before those of each device, and by file offset. Most callers give extents
// in this order.
void sort(std::vector<Fragment>& extents) {
  const auto key = [](const Fragment& extent) {
    return std::pair(extent.priority << 8 | extent.device, extent.offset_bytes);
  };
  const auto before = [key](const Fragment& a, const Fragment& b) { return key(a) < key(b); };
  if (!std::is_sorted(extents.begin(), extents.end(), before)) std::stable_sort(extents.begin(), extents.end(), before);
}

// Adds fragments to a plan, in ascending order of each priority and device.
class Cutter {
 public:
  Cutter(Plan& plan, std::uint32_t chunk_bytes, Alignment alignment, std::uint64_t max_gap_bytes)
      : plan_(plan), chunk_bytes_(chunk_bytes), alignment_(alignment), max_gap_bytes_(max_gap_bytes) {
    assert(alignment.block_bytes >= kPageBytes && alignment.block_bytes <= chunk_bytes);
    assert(alignment.memory_bytes <= alignment.block_bytes);
  }

  /// Adds a fragment that may be in place if it has at least `min_in_place_bytes` in whole disk blocks.
  void add(Fragment fragment, std::uint64_t min_in_place_bytes = kMinInPlaceBytes) {
    const std::uint64_t inner_begin = round_up(fragment.offset_bytes, alignment_.block_bytes);
    const std::uint64_t inner_end = round_down(end_of(fragment), alignment_.block_bytes);
    const bool in_place = fragment.device == kHost && same_phase(fragment, alignment_.memory_bytes);
    if (in_place && inner_end >= inner_begin + min_in_place_bytes) {
      add_in_cells(take_front(fragment, inner_begin - fragment.offset_bytes), false);
      add_in_cells(take_front(fragment, inner_end - inner_begin), true);
    }
    add_in_cells(fragment, false);
  }

  /// Lets the next fragment begin a chunk.
  void cut() { joinable_ = false; }

 private:
  void add_in_cells(Fragment fragment, bool in_place) {
    while (fragment.size_bytes > 0) {
      const std::uint64_t cell_end = round_down(fragment.offset_bytes, chunk_bytes_) + chunk_bytes_;
      const Fragment piece = take_front(fragment, std::min(fragment.size_bytes, cell_end - fragment.offset_bytes));
      if (in_place || !joins(piece)) append(piece, in_place);
      extend(piece);
    }
  }

  // Whether `piece` goes into the last chunk.
  bool joins(const Fragment& piece) const {
    if (!joinable_) return false;
    const Chunk& last = plan_.chunks.back();
    return !last.in_place && last.device == piece.device &&
           round_down(last.offset_bytes, chunk_bytes_) == round_down(piece.offset_bytes, chunk_bytes_) &&
           piece.offset_bytes >= last.offset_bytes && piece.offset_bytes <= end_of(last) + max_gap_bytes_;
  }

  void append(const Fragment& piece, bool in_place) {
    plan_.chunks.push_back(
        {piece.offset_bytes, 0, static_cast<std::uint32_t>(plan_.fragments.size()), 0, in_place, piece.device});
    joinable_ = true;
  }

  void extend(const Fragment& piece) {
    Chunk& chunk = plan_.chunks.back();
    assert(piece.offset_bytes >= chunk.offset_bytes &&
           end_of(piece) - round_down(chunk.offset_bytes, chunk_bytes_) <= chunk_bytes_);
    chunk.size_bytes = static_cast<std::uint32_t>(std::max(end_of(chunk), end_of(piece)) - chunk.offset_bytes);
    chunk.fragment_count++;
    plan_.fragments.push_back(piece);
    plan_.total_bytes += piece.size_bytes;
  }

  Plan& plan_;
  const std::uint32_t chunk_bytes_;
  const Alignment alignment_;
  const std::uint64_t max_gap_bytes_;
  bool joinable_ = false;  // Whether the last chunk may grow.
};

// Whether extent `i` is whole disk blocks that are best read on their own, in place: no neighbour is near enough to
// share their read, however small they are, or it would share a gap as well and needs no slot either.
bool has_own_read(std::span<const Fragment> extents, std::size_t i, std::uint32_t block_bytes) {
  const auto are_apart = [](const Fragment& before, const Fragment& after) {
    return before.priority != after.priority || before.device != after.device ||
           end_of(before) + kMaxGapBytes < after.offset_bytes;
  };
  const auto is_whole = [&](const Fragment& extent) {
    return extent.device == kHost && same_phase(extent, block_bytes) &&
           (extent.offset_bytes | extent.size_bytes) % block_bytes == 0;
  };
  const auto is_worth_a_read = [&](const Fragment& extent) {
    return extent.size_bytes >= kMinOwnReadBytes && is_whole(extent);
  };
  const auto share_no_read = [&](const Fragment& before, const Fragment& after) {
    const bool have_gap = end_of(before) < after.offset_bytes;
    return are_apart(before, after) || (have_gap && is_worth_a_read(before) && is_worth_a_read(after));
  };
  return is_whole(extents[i]) && (i == 0 || share_no_read(extents[i - 1], extents[i])) &&
         (i + 1 == extents.size() || share_no_read(extents[i], extents[i + 1]));
}

// Lets the devices that have chunks of one priority take turns.
void take_turns(std::vector<Chunk>& chunks, std::span<const Fragment> fragments) {
  if (std::ranges::all_of(chunks, [](const Chunk& chunk) { return chunk.device <= 1; })) return;
  using Place = std::pair<std::uint64_t, Chunk>;  // Sorted by priority and turn. Each chunk of the host has turn 0.
  std::vector<Place> places;
  places.reserve(chunks.size());
  for (const Chunk& chunk : chunks) {
    const bool on_device = chunk.device != kHost;
    const std::uint64_t first = std::uint64_t{fragments[chunk.first_fragment].priority} << 32 | on_device;
    const bool goes_on = !places.empty() && places.back().second.device == chunk.device && places.back().first >= first;
    places.emplace_back(goes_on ? places.back().first + on_device : first, chunk);
  }
  std::ranges::stable_sort(places, {}, &Place::first);
  std::ranges::transform(places, chunks.begin(), &Place::second);
}

// Number of extents at the front that follow on each other, with only gaps that are filled with zeros.
std::size_t contiguous(std::span<const Fragment> extents, std::uint64_t max_gap_bytes) {
  std::size_t count = 1;
  while (count < extents.size() && extents[count].device == extents[count - 1].device &&
         extents[count].offset_bytes <= end_of(extents[count - 1]) + max_gap_bytes)
    ++count;
  return count;
}

// Adds contiguous extents of a store. Head, body and tail never share a chunk, because only the body is whole disk
// blocks.
void add_store(Plan& plan, Cutter& cutter, std::span<const Fragment> extents, std::uint32_t block_bytes) {
  const std::uint64_t begin = extents.front().offset_bytes;
  const std::uint64_t end = end_of(extents.back());
  const std::uint64_t body_begin = round_up(begin, block_bytes);
  const std::uint64_t body_end = std::max(body_begin, round_down(end, block_bytes));
  const std::size_t first_chunk = plan.chunks.size();
  for (const auto& [from, to] :
       {std::pair{begin, body_begin}, std::pair{body_begin, body_end}, std::pair{body_end, end}}) {
    cutter.cut();
    for (Fragment fragment : extents) {
      if (end_of(fragment) <= from || fragment.offset_bytes >= to) continue;
      if (fragment.offset_bytes < from) take_front(fragment, from - fragment.offset_bytes);
      cutter.add(take_front(fragment, std::min(fragment.size_bytes, to - fragment.offset_bytes)));
    }
  }
  for (Chunk& chunk : std::span(plan.chunks).subspan(first_chunk)) {
    if (chunk.offset_bytes < body_begin || chunk.offset_bytes >= body_end) continue;
    const std::uint64_t whole_end = round_up(end_of(chunk), block_bytes);
    chunk.offset_bytes = round_down(chunk.offset_bytes, block_bytes);
    chunk.size_bytes = static_cast<std::uint32_t>(whole_end - chunk.offset_bytes);
  }
}

}  // namespace

Plan Plan::of_load(std::vector<Fragment> extents, std::uint32_t chunk_bytes, std::uint32_t block_bytes) {
  sort(extents);
  Plan plan;
  plan.fragments.reserve(extents.size());
  Cutter cutter(plan, chunk_bytes, {block_bytes, block_bytes}, kMaxGapBytes);
  for (std::size_t i = 0; i < extents.size(); ++i) {
    if (i > 0 && extents[i].priority != extents[i - 1].priority) cutter.cut();
    cutter.add(extents[i], has_own_read(extents, i, block_bytes) ? block_bytes : kMinInPlaceBytes);
  }
  take_turns(plan.chunks, plan.fragments);
  return plan;
}

Plan Plan::of_store(std::vector<Fragment> extents, std::uint32_t chunk_bytes, Alignment alignment) {
  sort(extents);
  const std::uint64_t max_gap_bytes = zeros_between(extents, alignment);
  Plan plan;
  plan.fragments.reserve(extents.size());
  Cutter cutter(plan, chunk_bytes, alignment, max_gap_bytes);
  for (auto rest = std::span<const Fragment>(extents); !rest.empty();) {
    const std::size_t count = contiguous(rest, max_gap_bytes);
    add_store(plan, cutter, rest.first(count), alignment.block_bytes);
    rest = rest.subspan(count);
  }
  return plan;
}

std::uint64_t Plan::zeros_between(std::span<const Fragment> extents, Alignment alignment) {
  const auto is_elsewhere = [&](const Fragment& extent) { return extent.device != extents.front().device; };
  return std::ranges::any_of(extents, is_elsewhere) ? 0 : alignment.block_bytes - 1;
}

}  // namespace flashpack::internal
