/// What the machine can do with the least code: the figures that the engine is held against.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace flashpack::bench {

/// Reads the first `target.size()` bytes past the page cache: io_uring, O_DIRECT, 4 MiB reads, 8 in flight, straight
/// into `target`, which must be 4 KiB aligned. Reads whole blocks: `target` may be up to one block short of its memory.
/// Throws: std::system_error.
void read_direct(const std::filesystem::path& path, std::span<std::byte> target);

/// Reads the first `target.size()` bytes with pread on one thread per core, 4 MiB each. Throws: std::system_error.
void read_buffered(const std::filesystem::path& path, std::span<std::byte> target);

/// The same by memcpy from a mapping of the file.
void copy_mapped(const std::filesystem::path& path, std::span<std::byte> target);

/// Makes a new file of `source`, past the page cache and durable: space reserved, io_uring, O_DIRECT, 4 MiB writes, 8
/// in flight, fdatasync. `source` must be 4 KiB aligned; whole blocks are written, so it may be up to one block short
/// of its memory. Throws: std::system_error.
void write_direct(const std::filesystem::path& path, std::span<std::byte> source);

}  // namespace flashpack::bench
