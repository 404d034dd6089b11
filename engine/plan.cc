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

std::uint64_t end_of(const Piece& piece) { return piece.offset_bytes + piece.size_bytes; }
std::uint64_t end_of(const Chunk& chunk) { return chunk.offset_bytes + chunk.size_bytes; }

bool same_phase(const Piece& piece, std::uint32_t align_bytes) {
  return ((reinterpret_cast<std::uintptr_t>(piece.memory) ^ piece.offset_bytes) & (align_bytes - 1)) == 0;
}

Piece take_front(Piece& piece, std::uint64_t size_bytes) {
  const Piece front{piece.offset_bytes, size_bytes, piece.memory};
  piece = {piece.offset_bytes + size_bytes, piece.size_bytes - size_bytes, piece.memory + size_bytes};
  return front;
}

std::vector<Piece> sorted(std::span<const Piece> extents) {
  std::vector<Piece> pieces(extents.begin(), extents.end());
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.offset_bytes < b.offset_bytes; });
  return pieces;
}

// Adds pieces, in ascending order, to a plan.
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

  void add(Piece piece) {
    const std::uint64_t inner_begin = round_up(piece.offset_bytes, alignment_.block_bytes);
    const std::uint64_t inner_end = round_down(end_of(piece), alignment_.block_bytes);
    const bool in_place = !on_device_ && same_phase(piece, alignment_.memory_bytes);
    if (in_place && inner_end >= inner_begin + kMinInPlaceBytes) {
      add_staged(take_front(piece, inner_begin - piece.offset_bytes));
      add_in_place(take_front(piece, inner_end - inner_begin));
    }
    add_staged(piece);
  }

  /// What comes next begins a chunk of its own.
  void cut() { joinable_ = false; }

 private:
  // How much of `piece` lies in the grid cell of its first byte.
  std::uint64_t bytes_in_cell(const Piece& piece) const {
    return std::min(piece.size_bytes, round_down(piece.offset_bytes, chunk_bytes_) + chunk_bytes_ - piece.offset_bytes);
  }

  bool joins(const Chunk& last, const Piece& part) const {
    return joinable_ && !last.in_place &&
           round_down(last.offset_bytes, chunk_bytes_) == round_down(part.offset_bytes, chunk_bytes_) &&
           part.offset_bytes >= last.offset_bytes && part.offset_bytes <= end_of(last) + max_gap_bytes_;
  }

  void append(const Piece& part, bool in_place) {
    plan_.chunks.push_back(
        {part.offset_bytes, 0, static_cast<std::uint32_t>(plan_.pieces.size()), 0, in_place, on_device_});
    joinable_ = true;
  }

  void add_staged(Piece piece) {
    while (piece.size_bytes > 0) {
      const Piece part = take_front(piece, bytes_in_cell(piece));
      if (plan_.chunks.empty() || !joins(plan_.chunks.back(), part)) append(part, false);
      extend(part);
    }
  }

  void add_in_place(Piece piece) {
    while (piece.size_bytes > 0) {
      const Piece part = take_front(piece, bytes_in_cell(piece));
      append(part, true);
      extend(part);
    }
  }

  void extend(const Piece& part) {
    Chunk& chunk = plan_.chunks.back();
    chunk.size_bytes = static_cast<std::uint32_t>(std::max(end_of(chunk), end_of(part)) - chunk.offset_bytes);
    chunk.piece_count++;
    plan_.pieces.push_back(part);
  }

  Plan& plan_;
  const std::uint32_t chunk_bytes_;
  const Alignment alignment_;
  const bool on_device_;
  const std::uint64_t max_gap_bytes_;
  bool joinable_ = false;  // The last chunk may grow.
};

std::size_t run_length(std::span<const Piece> pieces, std::uint64_t max_gap_bytes) {
  std::size_t length = 1;
  while (length < pieces.size() && pieces[length].offset_bytes <= end_of(pieces[length - 1]) + max_gap_bytes) ++length;
  return length;
}

}  // namespace

void Plan::add_load(std::span<const Piece> extents, std::uint32_t chunk_bytes, std::uint32_t block_bytes,
                    bool on_device) {
  Cutter cutter(*this, chunk_bytes, {block_bytes, block_bytes}, on_device, kMaxGapBytes);
  for (const Piece& piece : sorted(extents)) {
    total_bytes += piece.size_bytes;
    cutter.add(piece);
  }
}

void Plan::add_store(std::span<const Piece> extents, std::uint32_t chunk_bytes, Alignment alignment, bool fill_gaps,
                     bool on_device) {
  const std::uint32_t block_bytes = alignment.block_bytes;
  const std::uint64_t max_gap_bytes = fill_gaps ? block_bytes - 1 : 0;
  const std::vector<Piece> in_order = sorted(extents);
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
      for (Piece piece : run) {
        if (end_of(piece) <= begin || piece.offset_bytes >= end) continue;
        if (piece.offset_bytes < begin) take_front(piece, begin - piece.offset_bytes);
        cutter.add(take_front(piece, std::min(piece.size_bytes, end - piece.offset_bytes)));
      }
      cutter.cut();
    }
    for (Chunk& chunk : std::span(chunks).subspan(first_chunk)) {
      if (chunk.offset_bytes < body_begin || chunk.offset_bytes >= body_end) continue;
      const std::uint64_t end = round_up(end_of(chunk), block_bytes);
      chunk.offset_bytes = round_down(chunk.offset_bytes, block_bytes);
      chunk.size_bytes = static_cast<std::uint32_t>(end - chunk.offset_bytes);
    }
    for (const Piece& piece : run) total_bytes += piece.size_bytes;
  }
}

}  // namespace flashpack::internal
