/// Files that are recognised, and seen to have changed.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

namespace flashpack {

/// Says which file it is and in which state: st_dev, st_ino, st_size, st_mtim. File systems that cache these (FUSE,
/// network) are asked for current values. If two identities differ, the file is another one or has changed. If they are
/// equal, the bytes are the same, except for changes that st_mtim does not show; only Checksums find those:
///
///   * st_mtim changes when a write(2) begins. A write that began before the first identity was taken can still change
///     bytes after it.
///   * Two changes within one tick of the file system's clock give the same st_mtim. A tick is up to 10 ms before Linux
///     6.13, and later on file systems without multigrain timestamps; it is 2 s on FAT.
///   * A store through a shared mapping changes st_mtim only if it is the first to its page since the page was last
///     written back.
///   * The owner of the file can set st_mtim to any value (utimensat(2)).
///
/// For a block device, it says only which device it is, with which medium: `dev` is st_rdev, `ino` is the number that
/// the kernel gives to each medium and to each file behind a loop device (Linux 5.15, else 0), `size_bytes` is the
/// size of the device, and `mtime_ns` is 0. It shows no write to the device; only Checksums do.
struct FileIdentity {
  std::uint64_t dev = 0;
  std::uint64_t ino = 0;
  std::uint64_t size_bytes = 0;
  std::int64_t mtime_ns = 0;  ///< Nanoseconds since 1970, which wrap around in 2262.

  friend bool operator==(const FileIdentity&, const FileIdentity&) = default;
};

/// Opens the file at `path` for reading. Returns a descriptor, which the caller closes, or -1 with errno set. A FIFO
/// without a writer is opened without waiting; a regular file under a write lease is waited for. Any thread.
int open_to_read(const std::filesystem::path& path);

/// The identity of the file that is open as `fd`; empty, with errno set, when the file system does not tell. Any
/// thread.
std::optional<FileIdentity> identity_of(int fd) noexcept;

}  // namespace flashpack
