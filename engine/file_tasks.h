/// Has threads of the pool open and close files.
#pragma once

#include <cstdint>
#include <memory>

#include "engine/ground/unique_fd.h"
#include "engine/inbox.h"
#include "engine/open_part.h"
#include "engine/pool.h"

namespace flashpack::internal {

/// Opens and closes the files of parts in threads of the pool, because both may block in the file system, and tells the
/// driver of each that is done. A thread that a file system does not answer may be left behind, and therefore uses
/// nothing but what it owns or shares.
///
/// Thread safety: one thread, the driver, which finds the answers in inbox().
class FileTasks {
 public:
  /// Borrows the pool, and the queue, which serves the files and in which the driver sleeps.
  FileTasks(Pool& pool, DiskQueue& disk, OpenRules rules);

  /// The driver's inbox. It lives as long as this.
  Inbox& inbox() const noexcept;

  /// Plans a small load in the calling thread, if another load has its file open, and it can be seen without waiting
  /// for a file system that its path leads there. Otherwise, or if a thread may read all of it at once, returns null,
  /// and the file is to be opened by a thread.
  std::unique_ptr<PlannedFile> join(const Part& part);
  /// Has the file of a part in kOpening opened. The thread takes the part's descriptor, and answers with the file.
  void open(Part& part);
  /// Has the file of a part in kClosing checked and closed. The thread takes the file.
  void close(Part& part);
  /// Has a descriptor closed that a load was given but did not use.
  void close(UniqueFd given);
  /// Has a file with a handle closed, of which the driver was the last user.
  void close(std::unique_ptr<OpenFile> file);

 private:
  void leave(FileUse use);

  struct Shared;
  class OpenTask;
  class CloseTask;
  template <class Owner>
  class ReleaseTask;

  Pool& pool_;
  const OpenRules rules_;
  const std::shared_ptr<Shared> shared_;  // Shared, because threads that are left behind outlive the pipeline.
};

}  // namespace flashpack::internal
