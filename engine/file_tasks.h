/// Has threads of the pool open and close files.
#pragma once

#include <cstdint>
#include <memory>

#include "engine/ground/unique_fd.h"
#include "engine/inbox.h"
#include "engine/part.h"
#include "engine/pool.h"

namespace flashpack::internal {

/// Opens and closes the files of parts in threads of the pool, because both may block in the file system, and tells the
/// driver of each that is done. A thread that a file system does not answer may be left behind, and therefore uses
/// nothing but what it owns or shares.
///
/// Thread safety: one thread, the driver, which finds the answers in inbox().
class FileTasks {
 public:
  /// Borrows the pool, and the queue, which serves the files and in which the driver sleeps. A part of at most
  /// `at_once_bytes` is read by the thread that opens its file, if it is cached.
  FileTasks(Pool& pool, DiskQueue& disk, std::uint32_t chunk_bytes, std::uint32_t at_once_bytes);

  /// The driver's inbox. It lives as long as this.
  Inbox& inbox() const noexcept;

  /// Has the file of a part in kOpening opened, or that of a part in kClosing checked and closed. Until the answer, the
  /// part belongs to the thread.
  void post(Part& part);
  /// Closes a descriptor that a load was given but did not use.
  void close(UniqueFd given);

 private:
  struct Shared;
  class FileTask;
  class CloseTask;

  Pool& pool_;
  const std::uint32_t chunk_bytes_;
  const std::uint32_t at_once_bytes_;
  const std::shared_ptr<Shared> shared_;  // Shared, because threads that are left behind outlive the pipeline.
};

}  // namespace flashpack::internal
