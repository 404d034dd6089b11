/// Open files that several transfers share.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "engine/file.h"
#include "engine/ground/unique_fd.h"
#include "engine/io_queue.h"
#include "engine/residency.h"
#include "flashpack/file_handle.h"

namespace flashpack::internal {

/// An open file, with the driver's notes about it. Loads of one path share it, and a FileWriter and a FileHandle share
/// their file with its transfers, because any of them may be the last to use the file.
struct OpenFile : std::enable_shared_from_this<OpenFile> {
  OpenFile(File opened, DiskQueue* its_queue, std::uint64_t its_engine = 0)
      : file(std::move(opened)), engine(its_engine), queue(its_queue) {}

  /// Makes a handle of a file that has no users yet. The handle and its copies are one user.
  static FileHandle handle(std::shared_ptr<OpenFile> open);
  /// Null if the handle has no file.
  static std::shared_ptr<OpenFile> of(const FileHandle& handle) noexcept {
    return handle.open_ ? handle.open_->shared_from_this() : nullptr;
  }

  // Any thread counts itself as a user of a file with a handle. The last user has to call close(), which may block, so
  // that the driver leaves it to a thread of the pool. The users are counted here, because a shared_ptr cannot tell who
  // is the last. Files without a handle are closed by their last shared_ptr.
  void add_user() noexcept { ++users_; }
  /// Returns true for the last user.
  bool remove_user() noexcept { return --users_ == 0; }
  void close() noexcept;

  File file;                           // Constant until close().
  std::optional<Residency> residency;  // Set for a FileHandle, whose loads need not find out how to ask.
  const std::uint64_t engine;          // EngineFacts::number of the engine that has opened it for a FileHandle, else 0.

  // Only for the driver.
  DiskQueue* queue;         // The queue that serves the file.
  std::uint32_t stuck = 0;  // Operations on the file that are late or abandoned.

 private:
  std::atomic<std::uint32_t> users_ = 0;
};

/// Files that are open for loads, so that loads of the same path share one. Files are not looked up by inode alone,
/// because some file systems give two files the same number. Thread safety: any thread.
class FileTable {
 public:
  /// `queue` serves the files.
  explicit FileTable(DiskQueue* queue) : queue_(queue) {}

  /// Opens the file of `given` or, without it, the file that is at `path` now. May block. Throws: Error, as
  /// File::open(). `serve`, if given, is called as soon as the file can be read through the page cache. If it returns
  /// true, it has read all that was wanted, and the file is neither opened for direct reads nor shared.
  std::shared_ptr<OpenFile> open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected,
                                 bool want_direct, UniqueFd given = {},
                                 const std::function<bool(const File&)>& serve = {});

 private:
  std::shared_ptr<OpenFile> find(const std::filesystem::path& path, const std::optional<FileIdentity>& expected,
                                 bool want_direct);

  DiskQueue* const queue_;
  std::mutex mutex_;                                               // Protects the rest.
  std::map<std::filesystem::path, std::weak_ptr<OpenFile>> open_;  // Weak, so that a file is closed after its loads.
};

}  // namespace flashpack::internal
