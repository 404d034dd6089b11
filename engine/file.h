/// One open file: its descriptors, alignment and identity.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <system_error>

#include "engine/ground/unique_fd.h"
#include "engine/plan.h"
#include "flashpack/file_identity.h"

namespace flashpack::internal {

/// An open file: its descriptors for both routes, and the facts about it that do not change. open() and
/// created() make one, open_direct() adds a descriptor, drop_from_cache() acts on the page cache, and the other
/// functions ask for a fact.
///
/// Move-only. Thread safety: const members from any thread.
class File {
 public:
  /// Opens a regular file or block device for buffered reads and, if the file system allows it, for direct ones. Both
  /// descriptors are of the same inode. If `opened` is given, it is that descriptor's inode, even if `path` leads to
  /// another one by now. Throws: Error; EISDIR for a directory, kInvalidArgument for files of other kinds, and
  /// kFileChanged if `expected` is given and differs. May block.
  static File open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected, bool want_direct,
                   UniqueFd opened = {});

  /// Opens the file for direct reads, too, if the file system allows it; else direct_error() says why not. May block.
  void open_direct();

  /// The identity of the file that is at `path` now; empty if the file system does not tell. May block, as may
  /// check_unchanged().
  static std::optional<FileIdentity> identity_at(const std::filesystem::path& path) noexcept;

  /// Takes a new, empty file at `path` that is open for reading and writing as `fd`. Opens it for direct writes, too,
  /// if the file system allows it; else direct_error() says why not. May block.
  static File created(std::filesystem::path path, UniqueFd fd);

  const std::filesystem::path& path() const noexcept { return path_; }
  const FileIdentity& identity() const noexcept { return identity_; }
  int buffered_fd() const noexcept { return buffered_.get(); }
  /// -1 if direct I/O is refused or was not wanted.
  int direct_fd() const noexcept { return direct_.get(); }
  bool wanted_direct() const noexcept { return wanted_direct_; }
  /// Whether a direct read may block the thread that submits it, because the file system on this old kernel cannot
  /// refuse to wait. False without direct_fd().
  bool may_block() const noexcept { return may_block_; }
  /// The reason if direct_fd() is -1 although it was wanted: the system's error, or kFileChanged.
  std::error_code direct_error() const noexcept { return direct_error_; }
  /// The alignment that direct I/O demands.
  Alignment alignment() const noexcept { return alignment_; }

  /// Whether it is known that the file system tells of an open file without waiting for anything.
  bool answers_at_once() const noexcept { return answers_at_once_; }
  /// Whether `path` leads to the file as it was at open(), and the caller may read it. Never waits for a file system,
  /// and so is false, too, if the kernel would have to ask one.
  bool is_known_to_be_at(const std::filesystem::path& path) const noexcept;

  /// No error if the file is still as it was at open(), kFileChanged if it is not, and the system's error if the file
  /// system does not tell. A rename over its path is no change, because the descriptor keeps the old file.
  std::error_code check_unchanged() const noexcept;

  /// Drops the file's clean pages from the page cache. Quick if most are gone already.
  void drop_from_cache() const noexcept;

 private:
  File(std::filesystem::path path, UniqueFd buffered) : path_(std::move(path)), buffered_(std::move(buffered)) {}
  void open_direct_for(int access);
  std::error_code open_same(int access);

  bool by_descriptor_ = false;  // The caller has given a descriptor, so that the path may lead elsewhere.

  std::filesystem::path path_;
  UniqueFd buffered_;
  UniqueFd direct_;
  FileIdentity identity_;
  Alignment alignment_;
  std::error_code direct_error_;
  bool wanted_direct_ = false;
  bool may_block_ = false;
  bool answers_at_once_ = false;
  bool is_device_ = false;
};

/// A duplicate of `fd`, which is open on the file at `path`. Throws: Error.
UniqueFd duplicate(int fd, const std::filesystem::path& path);

}  // namespace flashpack::internal
