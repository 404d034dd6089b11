/// From extents to chunks: what to read, in which pieces it is delivered. Pure arithmetic, no I/O.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace flashpack::engine {

/// Smallest unit of a read in place: a page, so that no page is shared between the kernel's write and anybody else's.
inline constexpr std::uint32_t kPageBytes = 4096;

/// A run of file bytes and the memory it belongs to.
struct Piece {
  std::uint64_t offset_bytes;
  std::uint64_t size_bytes;
  std::byte* memory;
};

/// One read or write: pieces of one file that lie in one cell of the grid, in ascending order of offset, with only
/// small gaps between them.
struct Chunk {
  std::uint64_t offset_bytes;  ///< First wanted byte.
  std::uint32_t size_bytes;    ///< To the end of the last wanted byte.
  std::uint32_t file;          ///< Index given to Plan::add.
  std::uint32_t first_piece;
  std::uint32_t piece_count;
  /// One piece of whole blocks whose memory agrees with its offset modulo the block: can be read without a slot.
  bool in_place;
  bool on_device;  ///< The pieces' memory is out of reach for the CPU: always through a slot.
};

/// What a set of pieces allows.
struct PieceKind {
  bool on_device = false;  ///< Memory out of reach for the CPU.
  bool gaps = true;        ///< A chunk may span bytes that nobody wants. Not when it is written back.
};

/// The chunks of a transfer, file by file, ascending in each.
struct Plan {
  std::vector<Chunk> chunks;
  std::vector<Piece> pieces;
  std::uint64_t total_bytes = 0;  ///< Sum of the pieces' sizes.

  /// Cuts `extents` of file `file` on the grid: no chunk crosses a multiple of `chunk_bytes` in the file, so that a
  /// chunk widened to whole blocks still fits a slot. `block_bytes` is the file's direct I/O alignment, at least
  /// kPageBytes; both are powers of two. `kind` holds for all of `extents`.
  void add(std::uint32_t file, std::span<const Piece> extents, std::uint32_t chunk_bytes, std::uint32_t block_bytes,
           PieceKind kind = {});

  std::span<const Piece> pieces_of(const Chunk& chunk) const {
    return std::span(pieces).subspan(chunk.first_piece, chunk.piece_count);
  }

  /// Sum of the chunk's pieces; not its size where they leave gaps or overlap.
  std::uint64_t wanted_bytes(const Chunk& chunk) const {
    std::uint64_t sum = 0;
    for (const Piece& piece : pieces_of(chunk)) sum += piece.size_bytes;
    return sum;
  }

 private:
  void add_staged(std::uint32_t file, Piece piece, std::uint32_t chunk_bytes, PieceKind kind);
  void add_in_place(std::uint32_t file, Piece piece, std::uint32_t chunk_bytes);
};

constexpr std::uint64_t round_down(std::uint64_t value, std::uint64_t power_of_two) {
  return value & ~(power_of_two - 1);
}
constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t power_of_two) {
  return round_down(value + power_of_two - 1, power_of_two);
}

}  // namespace flashpack::engine
