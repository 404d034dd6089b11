/// A durable, atomic file, written in any number of transfers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <system_error>
#include <vector>

#include "flashpack/checksums.h"
#include "flashpack/transfer.h"

struct CUstream_st;  // CUDA's tag of cudaStream_t.

namespace flashpack {

/// One contiguous run of bytes in memory and where it goes in the file. Any offset, size and address are valid; the
/// engine hides alignment.
///
/// Fastest in calls that cover whole multiples of EngineOptions::chunk_bytes of the file: what is less than a block (4
/// KiB, mostly) at the end of a run goes through the page cache. Memory is written in place, without a copy, where it
/// is aligned as direct I/O wants it for the file's whole blocks: 512 bytes on most disks, 4 on most NVMe.
struct SourceExtent {
  std::uint64_t offset_bytes = 0;
  std::uint64_t size_bytes = 0;
  const void* source = nullptr;  ///< On the host (EFAULT where it cannot be read) or the engine's device; borrowed
                                 ///< until the transfer has finished.
};

struct WriteRequest {
  /// In any order. Where two of them are less than a block apart, zeros are written between them. What this writer has
  /// been given already is an error.
  std::vector<SourceExtent> extents;
  /// For sources on a CUDA device what LoadRequest::stream is for targets: they are read when all that is on it when
  /// start_write() is called has come to an end.
  CUstream_st* stream = nullptr;
  /// After it no new I/O is issued and the transfer ends with kDeadlineExceeded, as after Transfer::cancel().
  std::optional<Deadline> deadline;
};

struct WriterOptions {
  /// Bytes the payload has at least, when known: where the file system can, the space is reserved at once, so that a
  /// full disk is an error before anything has been written. 0: unknown.
  std::uint64_t payload_bytes = 0;
  bool checksums = false;  ///< Makes FileWriter::checksums() available.
  /// Where the path is a symbolic link: true replaces the file that it points to, there or not, false the link.
  bool follow_links = true;
};

/// Writes a new file beside `path` and puts it in place whole.
///
/// Until commit(), `path` is what it was before. The destructor without commit aborts: temporary file gone, old file
/// untouched. What a process leaves that is killed meanwhile, `.NAME.<random>.tmp` (a long name is cut), is removed by
/// the next writer for the same path, except where the file system has no flock(2). Made by Engine::create(), which
/// must outlive it.
///
/// A symbolic link is followed, also to what does not exist yet, unless the kernel would not (fs.protected_symlinks) or
/// WriterOptions say otherwise.
/// The new file has the permissions that the one that it replaces has at commit() and, where this process may give
/// them, its group and owner; not its ACL, other names (hard links) or extended attributes. Only regular files are
/// replaced.
///
/// As of Engine, what throws an Error has a like that gives its code instead.
///
/// Thread safety: distinct writers are independent; one writer is used by one thread at a time.
class FileWriter {
 public:
  FileWriter(FileWriter&&) noexcept;
  FileWriter& operator=(FileWriter&&) noexcept;
  /// Aborts unless committed: cancels what is still being written, detached or not, and waits for it.
  ~FileWriter();

  /// Starts a write, any number of times. What is never written reads as zeros. `completion`, if given, is borrowed
  /// until called.
  /// Throws: Error (kInvalidArgument; kUnusable; ENOSPC where the disk cannot take the bytes; an error of CUDA about
  /// `stream` or the sources), and then never calls `completion`. Other I/O errors come from the transfer.
  Transfer start_write(WriteRequest request, Completion* completion = nullptr);
  /// Not valid() after an error.
  Transfer start_write(WriteRequest request, Completion* completion, std::error_code& error) noexcept;

  /// start_write and wait. Throws: Error.
  TransferStats write(WriteRequest request);

  /// Of the payload, as it will be in the file. Costs nothing but looking: they were made while the bytes passed.
  /// Requires: WriterOptions::checksums; every transfer of this writer has finished. Throws: Error, the failed
  /// transfer's.
  Checksums checksums();
  Checksums checksums(std::error_code& error) noexcept;

  /// Appends `tail` after the payload (WriterOptions::payload_bytes, or the end of the last extent if that is later),
  /// makes everything durable and renames it into place.
  /// Requires: every transfer of this writer has finished; if one failed or was cancelled, this throws and aborts.
  /// When only the last step fails, the error says that the new file is in place but perhaps not durable.
  /// Throws: Error. After it, only destruction is allowed.
  void commit(std::span<const std::byte> tail = {});
  void commit(std::span<const std::byte> tail, std::error_code& error) noexcept;

 private:
  friend class Engine;
  class Impl;
  explicit FileWriter(std::unique_ptr<Impl> impl) noexcept;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flashpack
