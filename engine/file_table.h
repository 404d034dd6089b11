/// Open files that several transfers share.
#pragma once

#include <atomic>
#include <cassert>
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

class FileTable;

/// An open file, and what the driver remembers about it. Its users own it together: see FileUse. Its destructor closes
/// the file, which may block.
struct OpenFile {
  /// With one user. Borrows the queue, and `table`, which lists the file, if it is given.
  OpenFile(File opened, DiskQueue* its_queue, std::uint64_t its_engine, FileTable* table = nullptr)
      : file(std::move(opened)), engine(its_engine), table_(table), queue_(its_queue) {}

  const File file;
  std::optional<Residency>
      residency;               // Set if several loads may use the file, which then need not find out how to ask.
  const std::uint64_t engine;  // EngineFacts::number of the engine that has opened it for a FileHandle, else 0.

  /// The driver: operations on the file that are late or abandoned.
  std::uint32_t stuck() const noexcept { return stuck_; }
  void add_stuck() noexcept { ++stuck_; }
  void remove_stuck() noexcept {
    assert(stuck_ > 0);
    --stuck_;
  }

  /// The driver: the queue that serves the file, which is `stand_in` once the one that it was opened for has refused.
  DiskQueue& serving_queue(DiskQueue& stand_in) noexcept {
    if (queue_->refuses()) queue_ = &stand_in;
    return *queue_;
  }

 private:
  friend class FileUse;
  friend class FileTable;
  FileTable* const table_;
  // The only count of a file's users. All changes are sequentially consistent, so that the last user sees what the
  // others did with the file. The one that makes it 0 is under the table's mutex if the file is listed.
  std::atomic<std::uint32_t> users_ = 1;

  // Only for the driver.
  DiskQueue* queue_;
  std::uint32_t stuck_ = 0;
};

/// A user of an open file. All loads of one path use the same file at a time. The transfers of a FileWriter use the
/// writer's file, and the loads through a FileHandle use the handle's. The last user closes the file. That may block,
/// so the driver calls leave() instead of destroying a FileUse, and has a thread of the pool close the file. It
/// is no shared_ptr, because the last user must know that it is the last before the file is closed, and must take a
/// listed file out of its table in the same moment, so that nobody finds it there any more. Thread safety: as a
/// shared_ptr; users of one file may be in any threads.
class FileUse {
 public:
  /// Uses no file.
  FileUse() noexcept = default;
  /// The first user of a file that has just been opened. `queue`, which is borrowed, serves it, and `engine` is
  /// OpenFile::engine.
  FileUse(File opened, DiskQueue* queue, std::uint64_t engine = 0)
      : FileUse(std::make_unique<OpenFile>(std::move(opened), queue, engine)) {}
  /// A further user.
  FileUse(const FileUse& other) noexcept : FileUse(other.file_) {}
  FileUse(FileUse&& other) noexcept : file_(std::exchange(other.file_, nullptr)) {}
  FileUse& operator=(FileUse other) noexcept {
    std::swap(file_, other.file_);
    return *this;
  }
  ~FileUse() { leave(); }

  /// Makes the use that of a handle.
  static FileHandle handle(FileUse use) noexcept { return FileHandle(std::exchange(use.file_, nullptr)); }
  /// A further user of a handle's file, or no user if the handle has none.
  static FileUse of(const FileHandle& handle) noexcept { return FileUse(handle.file_); }
  /// The handle's own use, which leaves it without a file.
  static FileUse of(FileHandle&& handle) noexcept {
    FileUse use;
    std::swap(use.file_, handle.file_);
    return use;
  }

  explicit operator bool() const noexcept { return file_ != nullptr; }
  OpenFile* get() const noexcept { return file_; }
  OpenFile* operator->() const noexcept { return file_; }
  friend bool operator==(const FileUse& a, const FileUse& b) noexcept { return a.file_ == b.file_; }

  /// Whether the file has other users now.
  bool is_shared() const noexcept;
  /// Ends the use. Returns the file if this was its last user.
  std::unique_ptr<OpenFile> leave() noexcept;

 private:
  friend class FileTable;
  explicit FileUse(std::unique_ptr<OpenFile> opened) noexcept : file_(opened.release()) {}
  explicit FileUse(OpenFile* used) noexcept : file_(used) {
    if (file_) ++file_->users_;
  }

  OpenFile* file_ = nullptr;  // Has been counted as a user.
};

/// Files that are open for loads, so that loads of the same path share one. Files are not looked up by inode alone,
/// because some file systems give two files the same number. It must outlive the users of the files that it lists.
/// Thread safety: any thread.
class FileTable {
 public:
  /// Borrows the queue that serves the files, which must outlive their users.
  explicit FileTable(DiskQueue* queue) : queue_(queue) {}

  /// Opens the file of `given` or, without it, the file that is at `path` now. May block. Throws: Error, as
  /// File::open(). `serve`, if given, is called as soon as the file can be read through the page cache. If it returns
  /// true, it has read all that was wanted, and the file is neither opened for direct reads nor shared.
  FileUse open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected, bool want_direct,
               UniqueFd given = {}, const std::function<bool(const File&)>& serve = {});
  /// A further user of the file that was opened at `path`, if such a load may use it; it may have been replaced since.
  FileUse listed(const std::filesystem::path& path, const std::optional<FileIdentity>& expected, bool want_direct);

 private:
  friend class FileUse;
  FileUse find(const std::filesystem::path& path, const std::optional<FileIdentity>& expected, bool want_direct);
  bool leave(OpenFile& file) noexcept;

  DiskQueue* const queue_;
  std::mutex mutex_;  // Protects the rest. Files that are listed are joined and left under it, so that each has a user.
  std::map<std::filesystem::path, OpenFile*> listed_;  // Borrowed from the users.
};

}  // namespace flashpack::internal
