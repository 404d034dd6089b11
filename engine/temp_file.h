/// The file that a FileWriter writes to, until it takes its place.
#pragma once

#include <sys/stat.h>

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "engine/ground/unique_fd.h"
#include "flashpack/detail/owner_process.h"

namespace flashpack::internal {

/// `path` made absolute, so that it stays the same file when the working directory changes. Throws: Error.
std::filesystem::path absolute_path(const std::filesystem::path& path);

/// The same, and if it is a symbolic link, the path that it leads to, whether there is a file or not. Throws: Error;
/// EACCES if the kernel would not follow the link, kInvalidArgument if it is a link in /proc to an open file that has
/// no name.
std::filesystem::path resolve_links(const std::filesystem::path& path);

/// A new file beside the one that it is to replace, `.NAME.<random>.tmp`, and the steps that put it in place. Unless
/// it is in place, it goes with this object, but not with the copy of this object that a forked child has.
///
/// A process that is killed leaves its file behind. Therefore the file is locked while it is written, and the next
/// writer of the same target removes all files that nobody has locked. The lock is one of flock(2), which belongs to
/// the open file. It keeps out other threads as well as other processes, and ends when the process ends, for whatever
/// reason; a lock of fcntl(2) would end as soon as any descriptor of the file is closed. A child that is forked
/// meanwhile keeps the lock, too; then the file stays until a writer comes after that child's end. The ring never uses
/// this open file (File opens another one for direct I/O), so that no operation in flight keeps the lock longer than
/// the process. On a file system without flock the files that were left stay. Where the lock does not reach other hosts
/// (Lustre's localflock, NFS's nolock), one of two hosts that write one path at the same time fails to commit, and the
/// old file stays.
///
/// Errors name the target. Not thread-safe.
class TempFile {
 public:
  /// Whether a `target` that is a symbolic link, to a file or to nothing, is refused or replaced.
  enum class Links { kAreRefused, kAreReplaced };

  /// `target` is absolute, and as resolve_links() gives it unless links are replaced. Throws: Error if there is
  /// something else than a regular file.
  explicit TempFile(std::filesystem::path target, Links links = Links::kAreRefused);
  ~TempFile();
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;

  /// Removes files that others have left, and creates this one, empty. The descriptor holds the lock: keep it open
  /// as long as the file is written, and until commit() has returned. Throws: Error.
  UniqueFd create();

  /// Where the file is now.
  std::filesystem::path path() const { return target_.parent_path() / name_; }

  /// Makes the bytes of the file durable and puts it in place. `fd` is the file's. Throws: Error, also if something
  /// else than a file has taken the target's place.
  ///
  /// The file gets the permissions of the one that it replaces, as they are now, and its group and owner as far as this
  /// process may. The target of a link counts as the file that is replaced. A file that replaces none keeps what umask
  /// left.
  void commit(int fd);
  void sync_directory() const;  ///< Makes commit() itself durable. Throws: Error.

  /// Does nothing if the file is in place, or gone.
  void remove() noexcept;

 private:
  void look_at_target();
  void keep_access(int fd);
  void put_in_place();
  bool is_name_of_one(std::string_view name) const;
  void remove_if_left(const char* name) const noexcept;

  const detail::OwnerProcess owner_;
  std::filesystem::path target_;
  Links links_;
  UniqueFd directory_;                   // Kept open, so that all steps are in the same one even if it is renamed.
  std::optional<struct stat> replaced_;  // The file at the target, or at the end of its link, when last seen.
  std::string prefix_;                   // All names of temporary files for this target begin with it.
  std::string name_;                     // Name of the file in the directory; empty if there is none.
};

/// Replaces the file at `path`, or what it links to, at once by one of these bytes, as a FileWriter does: after a
/// failure the old file is whole. Any thread. Throws: Error.
void replace_file(const std::filesystem::path& path, std::string_view bytes);

}  // namespace flashpack::internal
