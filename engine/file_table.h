/// Open files that several transfers share.
#pragma once

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
#include "flashpack/file_handle.h"

namespace flashpack::internal {

/// An open file, with the driver's notes about it. Loads of one path share it, and a FileWriter and a FileHandle share
/// their file with its transfers, because any of them may be the last to use the file.
struct OpenFile {
  OpenFile(File opened, DiskQueue* its_queue, std::uint64_t its_engine = 0)
      : file(std::move(opened)), engine(its_engine), queue(its_queue) {}

  static FileHandle handle(std::shared_ptr<OpenFile> open) { return FileHandle(std::move(open)); }
  /// Null if the handle has no file.
  static const std::shared_ptr<OpenFile>& of(const FileHandle& handle) noexcept { return handle.open_; }

  const File file;
  const std::uint64_t engine;  // EngineFacts::number of the engine that has opened it for a FileHandle, else 0.

  // Only for the driver.
  DiskQueue* queue;         // The queue that serves the file.
  std::uint32_t stuck = 0;  // Operations on the file that are late or abandoned.
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
