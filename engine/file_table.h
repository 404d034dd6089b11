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

/// An open file, and what the driver remembers about it. It is open as long as it has users: see FileUse.
struct OpenFile {
  OpenFile(File opened, DiskQueue* its_queue, std::uint64_t its_engine)
      : file(std::move(opened)), engine(its_engine), queue(its_queue) {}

  File file;                           // Constant while the file has users.
  std::optional<Residency> residency;  // Set for a FileHandle, whose loads need not find out how to ask.
  const std::uint64_t engine;          // EngineFacts::number of the engine that has opened it for a FileHandle, else 0.

  void close() noexcept;

  // Only for the driver.
  DiskQueue* queue;         // The queue that serves the file.
  std::uint32_t stuck = 0;  // Operations on the file that are late or abandoned.

 private:
  friend class FileUse;
  std::atomic<std::uint32_t> users_ = 1;
};

/// A user of an open file. All loads of one path use the same file at a time. The transfers of a FileWriter use the
/// writer's file, and the loads through a FileHandle use the handle's. The last user closes the file. Closing may
/// block, so the driver calls leave() instead of destroying a FileUse, and has a thread of the pool close the file.
/// Thread safety: as a shared_ptr; users of one file may be in any threads.
class FileUse {
 public:
  /// Uses no file.
  FileUse() noexcept = default;
  /// The first user of a file that has just been opened. `queue` serves it, and `engine` is OpenFile::engine.
  FileUse(File opened, DiskQueue* queue, std::uint64_t engine = 0)
      : file_(std::make_shared<OpenFile>(std::move(opened), queue, engine)) {}
  /// A further user.
  FileUse(const FileUse& other) noexcept : file_(other.file_) {
    if (file_) ++file_->users_;
  }
  FileUse(FileUse&&) noexcept = default;
  FileUse& operator=(FileUse other) noexcept {
    std::swap(file_, other.file_);
    return *this;
  }
  ~FileUse() {
    if (const std::shared_ptr<OpenFile> last = leave()) last->close();
  }

  /// A further user of a file that some table remembers, or no user if nobody has the file open any more.
  static FileUse join(const std::weak_ptr<OpenFile>& remembered) noexcept;
  std::weak_ptr<OpenFile> remember() const noexcept { return file_; }

  /// The handle and its copies are one user.
  static FileHandle handle(FileUse use) { return FileHandle(std::make_shared<FileUse>(std::move(use))); }
  /// No user if the handle has no file.
  static FileUse of(const FileHandle& handle) noexcept { return handle.use_ ? *handle.use_ : FileUse(); }

  explicit operator bool() const noexcept { return file_ != nullptr; }
  OpenFile* get() const noexcept { return file_.get(); }
  OpenFile* operator->() const noexcept { return file_.get(); }
  friend bool operator==(const FileUse& a, const FileUse& b) noexcept { return a.file_ == b.file_; }

  /// Ends the use. Returns the file if this was its last user: it has to be closed then, in a thread that may block.
  std::shared_ptr<OpenFile> leave() noexcept;

 private:
  explicit FileUse(std::shared_ptr<OpenFile> file) noexcept : file_(std::move(file)) {}
  std::shared_ptr<OpenFile> file_;  // Shared with the tables that remember it, which do not keep it open.
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
  FileUse open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected, bool want_direct,
               UniqueFd given = {}, const std::function<bool(const File&)>& serve = {});

 private:
  FileUse find(const std::filesystem::path& path, const std::optional<FileIdentity>& expected, bool want_direct);

  DiskQueue* const queue_;
  std::mutex mutex_;                                               // Protects the rest.
  std::map<std::filesystem::path, std::weak_ptr<OpenFile>> open_;  // Weak, so that a file is closed after its loads.
};

}  // namespace flashpack::internal
