#include "engine/plan.h"

#include <algorithm>
#include <cassert>
#include <cstdint>

namespace flashpack::internal {

namespace {

// Below this an extra operation for the interior costs more than copying it through a slot.
constexpr std::uint64_t kMinInPlaceBytes = std::uint64_t{128} << 10;

// Unwanted bytes that are read along rather than split a read in two.
constexpr std::uint64_t kMaxGapBytes = std::uint64_t{64} << 10;

std::uint64_t end_of(const Fragment& fragment) { return fragment.offset_bytes + fragment.size_bytes; }
std::uint64_t end_of(const Chunk& chunk) { return chunk.offset_bytes + chunk.size_bytes; }

bool same_phase(const Fragment& fragment, std::uint32_t align_bytes) {
  return ((reinterpret_cast<std::uintptr_t>(fragment.memory) ^ fragment.offset_bytes) & (align_bytes - 1)) == 0;
}

Fragment take_front(Fragment& fragment, std::uint64_t size_bytes) {
  const Fragment front{fragment.offset_bytes, size_bytes, fragment.memory};
  fragment = {fragment.offset_bytes + size_bytes, fragment.size_bytes - size_bytes, fragment.memory + size_bytes};
  return front;
}

std::vector<Fragment> sorted(std::span<const Fragment> extents) {
  std::vector<Fragment> fragments(extents.begin(), extents.end());
  std::stable_sort(fragments.begin(), fragments.end(),
                   [](const Fragment& a, const Fragment& b) { return a.offset_bytes < b.offset_bytes; });
  return fragments;
}

// Adds fragments, in ascending order, to a plan.
class Cutter {
 public:
  Cutter(Plan& plan, std::uint32_t chunk_bytes, Alignment alignment, bool on_device, std::uint64_t max_gap_bytes)
      : plan_(plan),
        chunk_bytes_(chunk_bytes),
        alignment_(alignment),
        on_device_(on_device),
        max_gap_bytes_(max_gap_bytes) {
    assert(alignment.block_bytes >= kPageBytes && alignment.block_bytes <= chunk_bytes);
  }

  void add(Fragment fragment) {
    const std::uint64_t inner_begin = round_up(fragment.offset_bytes, alignment_.block_bytes);
    const std::uint64_t inner_end = round_down(end_of(fragment), alignment_.block_bytes);
    const bool in_place = !on_device_ && same_phase(fragment, alignment_.memory_bytes);
    if (in_place && inner_end >= inner_begin + kMinInPlaceBytes) {
      add_staged(take_front(fragment, inner_begin - fragment.offset_bytes));
      add_in_place(take_front(fragment, inner_end - inner_begin));
    }
    add_staged(fragment);
  }

  /// What comes next begins a chunk of its own.
  void cut() { joinable_ = false; }

 private:
  // How much of `fragment` lies in the grid cell of its first byte.
  std::uint64_t bytes_in_cell(const Fragment& fragment) const {
    return std::min(fragment.size_bytes,
                    round_down(fragment.offset_bytes, chunk_bytes_) + chunk_bytes_ - fragment.offset_bytes);
  }

  bool joins(const Chunk& last, const Fragment& part) const {
    return joinable_ && !last.in_place &&
           round_down(last.offset_bytes, chunk_bytes_) == round_down(part.offset_bytes, chunk_bytes_) &&
           part.offset_bytes >= last.offset_bytes && part.offset_bytes <= end_of(last) + max_gap_bytes_;
  }

  void append(const Fragment& part, bool in_place) {
    plan_.chunks.push_back(
        {part.offset_bytes, 0, static_cast<std::uint32_t>(plan_.fragments.size()), 0, in_place, on_device_});
    joinable_ = true;
  }

  void add_staged(Fragment fragment) {
    while (fragment.size_bytes > 0) {
      const Fragment part = take_front(fragment, bytes_in_cell(fragment));
      if (plan_.chunks.empty() || !joins(plan_.chunks.back(), part)) append(part, false);
      extend(part);
    }
  }

  void add_in_place(Fragment fragment) {
    while (fragment.size_bytes > 0) {
      const Fragment part = take_front(fragment, bytes_in_cell(fragment));
      append(part, true);
      extend(part);
    }
  }

  void extend(const Fragment& part) {
    Chunk& chunk = plan_.chunks.back();
    chunk.size_bytes = static_cast<std::uint32_t>(std::max(end_of(chunk), end_of(part)) - chunk.offset_bytes);
    chunk.fragment_count++;
    plan_.fragments.push_back(part);
  }

  Plan& plan_;
  const std::uint32_t chunk_bytes_;
  const Alignment alignment_;
  const bool on_device_;
  const std::uint64_t max_gap_bytes_;
  bool joinable_ = false;  // The last chunk may grow.
};

std::size_t run_length(std::span<const Fragment> fragments, std::uint64_t max_gap_bytes) {
  std::size_t length = 1;
  while (length < fragments.size() && fragments[length].offset_bytes <= end_of(fragments[length - 1]) + max_gap_bytes)
    ++length;
  return length;
}

}  // namespace

void Plan::add_load(std::span<const Fragment> extents, std::uint32_t chunk_bytes, std::uint32_t block_bytes,
                    bool on_device) {
  Cutter cutter(*this, chunk_bytes, {block_bytes, block_bytes}, on_device, kMaxGapBytes);
  for (const Fragment& fragment : sorted(extents)) {
    total_bytes += fragment.size_bytes;
    cutter.add(fragment);
  }
}

void Plan::add_store(std::span<const Fragment> extents, std::uint32_t chunk_bytes, Alignment alignment, bool fill_gaps,
                     bool on_device) {
  const std::uint32_t block_bytes = alignment.block_bytes;
  const std::uint64_t max_gap_bytes = fill_gaps ? block_bytes - 1 : 0;
  const std::vector<Fragment> in_order = sorted(extents);
  for (auto rest = std::span(in_order); !rest.empty();) {
    const auto run = rest.first(run_length(rest, max_gap_bytes));
    rest = rest.subspan(run.size());
    const std::uint64_t body_begin = round_up(run.front().offset_bytes, block_bytes);
    const std::uint64_t body_end = std::max(body_begin, round_down(end_of(run.back()), block_bytes));
    const std::size_t first_chunk = chunks.size();
    Cutter cutter(*this, chunk_bytes, alignment, on_device, max_gap_bytes);
    // Head, body and tail never share a chunk.
    for (const auto& [begin, end] : {std::pair{run.front().offset_bytes, body_begin}, std::pair{body_begin, body_end},
                                     std::pair{body_end, end_of(run.back())}}) {
      for (Fragment fragment : run) {
        if (end_of(fragment) <= begin || fragment.offset_bytes >= end) continue;
        if (fragment.offset_bytes < begin) take_front(fragment, begin - fragment.offset_bytes);
        cutter.add(take_front(fragment, std::min(fragment.size_bytes, end - fragment.offset_bytes)));
      }
      cutter.cut();
    }
    for (Chunk& chunk : std::span(chunks).subspan(first_chunk)) {
      if (chunk.offset_bytes < body_begin || chunk.offset_bytes >= body_end) continue;
      const std::uint64_t end = round_up(end_of(chunk), block_bytes);
      chunk.offset_bytes = round_down(chunk.offset_bytes, block_bytes);
      chunk.size_bytes = static_cast<std::uint32_t>(end - chunk.offset_bytes);
    }
    for (const Fragment& fragment : run) total_bytes += fragment.size_bytes;
  }
}

}  // namespace flashpack::internal
