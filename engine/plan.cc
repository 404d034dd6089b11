#include "engine/plan.h"

#include <algorithm>
#include <cassert>
#include <cstdint>

namespace flashpack::engine {

namespace {

// Below this an extra read for the interior costs more than copying it through a slot.
constexpr std::uint64_t kMinInPlaceBytes = std::uint64_t{128} << 10;

// Unwanted bytes that are read along rather than split a read in two.
constexpr std::uint64_t kMaxGapBytes = std::uint64_t{64} << 10;

bool same_phase(const Piece& piece, std::uint32_t block_bytes) {
  return ((reinterpret_cast<std::uintptr_t>(piece.memory) ^ piece.offset_bytes) & (block_bytes - 1)) == 0;
}

Piece take_front(Piece& piece, std::uint64_t size_bytes) {
  const Piece front{piece.offset_bytes, size_bytes, piece.memory};
  piece = {piece.offset_bytes + size_bytes, piece.size_bytes - size_bytes, piece.memory + size_bytes};
  return front;
}

// How much of `piece` lies in the grid cell of its first byte.
std::uint64_t bytes_in_cell(const Piece& piece, std::uint32_t chunk_bytes) {
  return std::min(piece.size_bytes, round_down(piece.offset_bytes, chunk_bytes) + chunk_bytes - piece.offset_bytes);
}

}  // namespace

void Plan::add(std::uint32_t file, std::span<const Piece> extents, std::uint32_t chunk_bytes, std::uint32_t block_bytes,
               PieceKind kind) {
  assert(block_bytes >= kPageBytes && block_bytes <= chunk_bytes);
  std::vector<Piece> sorted(extents.begin(), extents.end());
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const Piece& a, const Piece& b) { return a.offset_bytes < b.offset_bytes; });
  for (Piece piece : sorted) {
    total_bytes += piece.size_bytes;
    const std::uint64_t inner_begin = round_up(piece.offset_bytes, block_bytes);
    const std::uint64_t inner_end = round_down(piece.offset_bytes + piece.size_bytes, block_bytes);
    if (!kind.on_device && same_phase(piece, block_bytes) && inner_end >= inner_begin + kMinInPlaceBytes) {
      if (inner_begin > piece.offset_bytes)
        add_staged(file, take_front(piece, inner_begin - piece.offset_bytes), chunk_bytes, kind);
      add_in_place(file, take_front(piece, inner_end - inner_begin), chunk_bytes);
    }
    if (piece.size_bytes > 0) add_staged(file, piece, chunk_bytes, kind);
  }
}

void Plan::add_staged(std::uint32_t file, Piece piece, std::uint32_t chunk_bytes, PieceKind kind) {
  const std::uint64_t max_gap_bytes = kind.gaps ? kMaxGapBytes : 0;
  while (piece.size_bytes > 0) {
    const Piece part = take_front(piece, bytes_in_cell(piece, chunk_bytes));
    const std::uint64_t end = part.offset_bytes + part.size_bytes;
    Chunk* last = chunks.empty() ? nullptr : &chunks.back();
    const bool joins = last && !last->in_place && last->on_device == kind.on_device && last->file == file &&
                       round_down(last->offset_bytes, chunk_bytes) == round_down(part.offset_bytes, chunk_bytes) &&
                       part.offset_bytes >= last->offset_bytes &&
                       part.offset_bytes <= last->offset_bytes + last->size_bytes + max_gap_bytes;
    if (!joins) {
      chunks.push_back(
          {part.offset_bytes, 0, file, static_cast<std::uint32_t>(pieces.size()), 0, false, kind.on_device});
      last = &chunks.back();
    }
    last->size_bytes =
        static_cast<std::uint32_t>(std::max(last->offset_bytes + last->size_bytes, end) - last->offset_bytes);
    last->piece_count++;
    pieces.push_back(part);
  }
}

void Plan::add_in_place(std::uint32_t file, Piece piece, std::uint32_t chunk_bytes) {
  while (piece.size_bytes > 0) {
    const Piece part = take_front(piece, bytes_in_cell(piece, chunk_bytes));
    chunks.push_back({part.offset_bytes, static_cast<std::uint32_t>(part.size_bytes), file,
                      static_cast<std::uint32_t>(pieces.size()), 1, true, false});
    pieces.push_back(part);
  }
}

}  // namespace flashpack::engine
