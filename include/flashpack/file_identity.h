#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

namespace flashpack {

/// Which file, and which state of it, as the file system tells at that time: st_dev, st_ino, st_size, st_mtim. Where it
/// keeps what it told (FUSE, a network) it is asked again. Two that differ are two files, or two states of one. Two
/// that are equal mean the same bytes, but for what st_mtim does not show, and Checksums do:
///
///   * It moves when a write(2) begins, not while it lasts: one that began before the first identity was taken goes on
///     changing bytes after it.
///   * Of two changes within one tick of the file system's clock the second does not move it: up to 10 ms before Linux
///     6.13, and since then on file systems without multigrain timestamps; 2 s on FAT.
///   * Of stores through a shared mapping only the first one to a page, until that page has been written back, moves
///   it.
///   * Anybody who owns the file can set it (utimensat(2)).
struct FileIdentity {
  std::uint64_t dev = 0;
  std::uint64_t ino = 0;
  std::uint64_t size_bytes = 0;
  std::int64_t mtime_ns = 0;

  friend bool operator==(const FileIdentity&, const FileIdentity&) = default;
};

/// A descriptor of the file at `path`, open for reading and the caller's to close; -1, with errno set, when it cannot
/// be opened. A FIFO that nobody writes to does not hold it up; a regular file that somebody has a write lease on is
/// waited for. Any thread.
int open_to_read(const std::filesystem::path& path);

/// The identity of the file that is open as `fd`; none, with errno set, when it cannot be told. Any thread.
std::optional<FileIdentity> identity_of(int fd) noexcept;

}  // namespace flashpack
