/// Writes a durable file in any number of transfers, all or nothing.
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

/// Contiguous bytes in memory, and the place in the file that they go to. Any offset, size and address are valid; the
/// engine hides alignment.
///
/// Writes are fastest when each call covers whole multiples of EngineOptions::chunk_bytes of the file, because parts of
/// a disk block (mostly 4 KiB) at the ends go through the page cache. Memory is written without a copy if it has the
/// alignment that direct I/O demands for whole disk blocks: 512 bytes on most disks, 4 on most NVMe.
struct SourceExtent {
  std::uint64_t offset_bytes = 0;
  std::uint64_t size_bytes = 0;
  const void* source = nullptr;  ///< Memory of the host or of a device of the engine, borrowed until the transfer has
                                 ///< finished. EFAULT if host memory cannot be read,
                                 ///< where the kernel has MADV_POPULATE_READ; gVisor has not.
};

struct WriteRequest {
  /// Extents in any order. Between two extents that are less than a disk block apart, zeros are written, unless some
  /// extents of the request are on the host and some on a device, or on several devices. It is an error to write a byte
  /// of the file twice, also one of these zeros.
  std::vector<SourceExtent> extents;
  /// A cudaStream_t for sources on EngineOptions::device; null is as in LoadRequest::stream. Sources are not read
  /// before all work that is on the stream when start_write() is called has ended.
  CUstream_st* stream = nullptr;
  /// When it passes, the transfer ends as by Transfer::cancel(), but with kDeadlineExceeded.
  std::optional<Deadline> deadline;
  /// The streams for sources on EngineOptions::more_devices, as in LoadRequest::more_streams.
  std::vector<CUstream_st*> more_streams = {};
};

struct WriterOptions {
  /// Least size of the payload in bytes; 0 if unknown. The space is reserved at once if the file system can do that, so
  /// that a full disk is an error before anything has been written.
  std::uint64_t payload_bytes = 0;
  bool checksums = false;  ///< Makes FileWriter::checksums() available.
  /// Decides about a symbolic link at the path: true replaces the file that it points to, existing or not, false the
  /// link.
  bool follow_links = true;
};

/// Writes a new file beside `path`, which replaces `path` when it is complete.
///
/// Until commit(), `path` is unchanged. Without commit() the destructor removes the temporary file. A process that is
/// killed leaves it behind as `.NAME.<random>.tmp` (a long name is cut); the next writer for the same path removes it
/// if the file system has flock(2). Engine::create() makes a writer, and that engine must outlive it.
///
/// A symbolic link is followed, also to a path where nothing is yet, unless the kernel forbids it
/// (fs.protected_symlinks) or WriterOptions say otherwise. The new file gets the permissions that the replaced file has
/// at commit() and, if this process may set them, its group and owner. It does not get the ACL, hard links and extended
/// attributes. Only regular files are replaced.
///
/// As in Engine, start_write(), checksums() and commit() have a form for programs without exceptions. In place of
/// write(), these call start_write(), Transfer::wait_for() and Transfer::error().
///
/// Thread safety: distinct writers are independent; one writer is used by one thread at a time. In a forked child every
/// function that can fail says Errc::kUnusable, and the destructor removes nothing.
class FileWriter {
 public:
  FileWriter(FileWriter&&) noexcept;
  FileWriter& operator=(FileWriter&&) noexcept;
  /// Unless committed, cancels writes that are under way, detached ones too, waits for them, and removes the temporary
  /// file.
  ~FileWriter();

  /// Starts a write; may be called any number of times. Bytes that are never written read as zeros. A write that goes
  /// past WriterOptions::payload_bytes reserves its space before this returns, and no deadline bounds how long the file
  /// system takes for that. `completion`, if given, is borrowed until called. Throws: Error (kInvalidArgument;
  /// kUnusable; ENOSPC if the disk is full; an error of CUDA about a stream or the sources); `completion` is not called
  /// then. Other I/O errors come from the transfer.
  Transfer start_write(WriteRequest request, Completion* completion = nullptr);
  /// The transfer is not valid() after an error.
  Transfer start_write(WriteRequest request, Completion* completion, std::error_code& error) noexcept;

  /// Calls start_write() and waits. Throws: Error.
  TransferStats write(WriteRequest request);

  /// Checksums of the payload as it will be in the file. They were computed while the bytes were written, so this is
  /// quick. Requires: WriterOptions::checksums; every transfer of this writer has finished. Throws: the Error of a
  /// transfer that failed.
  Checksums checksums();
  Checksums checksums(std::error_code& error) noexcept;

  /// Appends `tail` after the payload (WriterOptions::payload_bytes, or the end of the last extent if that is later),
  /// makes everything durable and renames it into place. Requires: every transfer of this writer has finished; if one
  /// failed or was cancelled, this throws and aborts. If only the last step fails, the error says that the new file is
  /// in place but perhaps not durable. Throws: Error. After this call, only destruction is allowed.
  void commit(std::span<const std::byte> tail = {});
  void commit(std::span<const std::byte> tail, std::error_code& error) noexcept;

 private:
  friend class Engine;
  class Impl;
  explicit FileWriter(std::unique_ptr<Impl> impl) noexcept;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flashpack
