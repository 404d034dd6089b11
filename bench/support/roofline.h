/// Measures with the least code how fast the machine is, for comparison with the engine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "bench/support/open_file.h"

namespace flashpack::bench {

/// The queue depth of the rooflines of a whole file.
inline constexpr unsigned kQueueDepth = 8;

/// One read past the page cache. The memory is 4 KiB aligned and, because whole blocks are moved, reaches up to one
/// block past `memory`. The offset is a multiple of 4 KiB.
struct Piece {
  const OpenFile* file;  ///< Opened with O_DIRECT.
  std::uint64_t offset_bytes;
  std::span<std::byte> memory;
};

/// Cuts the file into pieces, a multiple of 4 KiB, from its beginning to the size of `memory`.
std::vector<Piece> pieces_of(const OpenFile& file, std::span<std::byte> memory,
                             std::size_t piece_bytes = std::size_t{4} << 20);

/// Reads the pieces with io_uring, `depth` of them in flight. Throws: std::system_error.
void read_pieces(std::span<const Piece> pieces, unsigned depth);

/// The same with pread, by so many threads, for machines that refuse io_uring.
void read_pieces_by_threads(std::span<const Piece> pieces, unsigned threads);

/// Does as read_pieces(), and returns how many seconds each read took, in no order.
std::vector<double> time_reads(std::span<const Piece> pieces, unsigned depth);

/// Reads the first `target.size()` bytes past the page cache: io_uring, O_DIRECT, 4 MiB reads, 8 in flight, straight
/// into `target`, which must be 4 KiB aligned. Whole blocks are read, so the memory must reach up to one block past
/// `target`. Throws: std::system_error.
void read_direct(const std::filesystem::path& path, std::span<std::byte> target);

/// Reads the first `target.size()` bytes with pread on one thread per core, 4 MiB each. Throws: std::system_error.
void read_buffered(const std::filesystem::path& path, std::span<std::byte> target);

/// Copies the same bytes with memcpy from a mapping of the file.
void copy_mapped(const std::filesystem::path& path, std::span<std::byte> target);

/// Makes a new file of `source`, past the page cache and durable: space reserved, io_uring, O_DIRECT, 4 MiB writes, 8
/// in flight, fdatasync. `source` must be 4 KiB aligned. Whole blocks are written, so the memory must reach up to one
/// block past `source`. Throws: std::system_error.
void write_direct(const std::filesystem::path& path, std::span<std::byte> source);

}  // namespace flashpack::bench
