/// One open file: its descriptors, alignment and identity.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

#include "engine/plan.h"
#include "engine/unique_fd.h"
#include "flashpack/file_identity.h"

namespace flashpack::internal {

/// Move-only. Thread safety: const members from any thread.
class File {
 public:
  /// Opens a regular file, buffered and (where the file system allows it) direct; both descriptors are the same inode:
  /// that of `opened`, when it is given, which `path` need not lead to any more.
  /// Throws: Error; kFileChanged when `expected` is given and differs.
  static File open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected, bool want_direct,
                   UniqueFd opened = {});

  /// Opens it for direct reads as well, where the file system allows it.
  void open_direct();

  /// The identity of what stands at `path` now; none when that cannot be told.
  static std::optional<FileIdentity> identity_at(const std::filesystem::path& path) noexcept;

  /// A new, empty file that is open for reading and writing as `fd`; opened direct, too, where the file system allows
  /// it. `path` is where it is now.
  static File created(std::filesystem::path path, UniqueFd fd);

  const std::filesystem::path& path() const noexcept { return path_; }
  const FileIdentity& identity() const noexcept { return identity_; }
  int buffered_fd() const noexcept { return buffered_.get(); }
  /// -1 where direct I/O is refused or was not wanted.
  int direct_fd() const noexcept { return direct_.get(); }
  bool wanted_direct() const noexcept { return wanted_direct_; }
  /// Whether a direct read may hold up whoever hands it to the kernel, for as long as it takes: on old kernels those
  /// that do not know how not to wait. False without direct_fd().
  bool may_block() const noexcept { return may_block_; }
  /// Why direct_fd() is -1, when it was wanted: an errno.
  int direct_error() const noexcept { return direct_error_; }
  /// Of direct I/O.
  Alignment alignment() const noexcept { return alignment_; }

  /// Whether the file is still what it was at open(). A rename over it is not a change: the descriptor keeps the old
  /// file.
  bool unchanged() const noexcept;

  /// Gives its clean pages in the page cache back. Quick where most are gone already.
  void drop_from_cache() const noexcept;

 private:
  File(std::filesystem::path path, UniqueFd buffered) : path_(std::move(path)), buffered_(std::move(buffered)) {}
  void open_direct_for(int access);

  std::filesystem::path path_;
  UniqueFd buffered_;
  UniqueFd direct_;
  FileIdentity identity_;
  Alignment alignment_;
  int direct_error_ = 0;
  bool wanted_direct_ = false;
  bool may_block_ = false;
};

}  // namespace flashpack::internal
