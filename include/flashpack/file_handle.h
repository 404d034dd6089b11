/// A file that stays open for many loads.
#pragma once

#include <cstdint>
#include <filesystem>
#include <system_error>
#include <utility>

#include "flashpack/file_identity.h"

namespace flashpack {

namespace internal {
class FileUse;
struct OpenFile;
}  // namespace internal

/// A file that Engine::open() has opened, for any number of loads of that engine, also at the same time. It is for
/// programs that read a little again and again, such as indices or blocks of a cache, because to open and close a file
/// costs more than to read a few pages of it. Small loads by path that are under way at the same time share the file,
/// too, but each of them still looks where its path leads. Pass it as FileExtents::handle.
///
/// The handle keeps the file, whatever is at its path by now. A load through it of more than EngineOptions::chunk_bytes
/// in all, or whose checksums are compared, notices a change of the file, as other loads do. A smaller one does not
/// look, because that would cost as much as the read: where a file may be written in place, ask check(), or use
/// checksums.
///
/// Copies share the file, which is closed after the last copy and the last load. Thread safety: as a shared_ptr. It may
/// outlive its engine. The end of the last copy may block in the file system, because it may close the file. In a
/// forked child a handle only says what it knows. Its end there closes the child's own descriptor, unless a load was
/// under way at the fork.
class FileHandle {
 public:
  /// No file.
  FileHandle() noexcept = default;
  FileHandle(const FileHandle& other) noexcept;
  FileHandle(FileHandle&& other) noexcept : file_(std::exchange(other.file_, nullptr)) {}
  FileHandle& operator=(FileHandle other) noexcept {
    std::swap(file_, other.file_);
    return *this;
  }
  ~FileHandle();

  bool valid() const noexcept { return file_ != nullptr; }

  // The functions below require: valid().

  /// The path that was opened, for messages.
  const std::filesystem::path& path() const noexcept;
  /// The identity that the file had when it was opened. Its size bounds the extents.
  const FileIdentity& identity() const noexcept;
  /// If offset, size and address are multiples of this, a read that goes past the page cache needs no copy. A read of
  /// less than 128 KiB is without a copy only if no other extent lies within 64 KiB of it. A load of 32 MiB
  /// or more to small pages of an engine's pool is copied all the same, see HostMemory. 4096 if the file has no direct
  /// I/O.
  std::uint32_t alignment_bytes() const noexcept;
  /// No error if the file still has that identity, Errc::kFileChanged if it has not, and an errno if the file system
  /// does not tell. May block in the file system.
  std::error_code check() const noexcept;
  /// Whether check() gives no error.
  bool unchanged() const noexcept { return !check(); }

 private:
  friend class internal::FileUse;
  explicit FileHandle(internal::OpenFile* used) noexcept : file_(used) {}
  internal::OpenFile* file_ = nullptr;  // This handle is one of its counted users.
};

}  // namespace flashpack
