/// The file of a FileWriter before it is in its place.
#pragma once

#include <sys/stat.h>

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "engine/unique_fd.h"

namespace flashpack::internal {

/// `path`, so that it stays the same file whatever the working directory is. Throws: Error.
std::filesystem::path absolute_path(const std::filesystem::path& path);

/// The same; where it is a symbolic link, what it points to, there or not. Throws: Error; EACCES where the kernel would
/// not follow the link, kInvalidArgument where it is one of /proc to an open file that has no name.
std::filesystem::path resolve_links(const std::filesystem::path& path);

/// A new file beside the one that it is to replace, `.NAME.<random>.tmp`, and the steps that put it in place.
///
/// A process that is killed leaves it behind. So it is locked while it is written, and who creates the next one for
/// the same target removes those that nobody holds a lock on. The lock is flock(2)'s. It belongs to the open file:
/// another thread's is in the way like another process's; it ends with the process, whatever ends that, and not before,
/// as fcntl(2)'s would when any descriptor of the file is closed. A child that was forked while it was held keeps it,
/// too: then the file stays until a writer comes after that child's end. No I/O of the ring refers to this open file
/// (File opens another one for direct I/O), so nothing that is in flight outlives the process with the lock.
/// Where there is no flock, what was left stays. Where it does not reach other hosts (Lustre's localflock, NFS's
/// nolock), one of two hosts that write one path at the same time fails to commit, and the old file stays.
///
/// Errors name the target. Not thread-safe.
class TempFile {
 public:
  /// This says what a save does where `target` is a symbolic link to a file, or to nothing.
  enum class Links { kAreRefused, kAreReplaced };

  /// `target`: absolute; as resolve_links() gives it, unless `links` are replaced. Throws: Error where it is something
  /// else than a regular file.
  explicit TempFile(std::filesystem::path target, Links links = Links::kAreRefused);

  /// Removes what is left of others, and creates this one, empty. What is given back holds the lock: keep it open until
  /// remove() or put_in_place(). Throws: Error.
  UniqueFd create();

  /// Where it is now.
  std::filesystem::path path() const { return target_.parent_path() / name_; }

  /// Gives what create() gave the permissions, and as far as this process may the group and owner, of the file that it
  /// replaces (of a link, those of its file), as they are now. A new file has what umask left. Throws: Error, also
  /// where something else than a file has taken the target's place.
  void keep_access(int fd);

  void put_in_place();          ///< Throws: Error.
  void sync_directory() const;  ///< Makes put_in_place() durable. Throws: Error.

  /// Nothing happens where it is in place, or gone.
  void remove() noexcept;

 private:
  void look_at_target();
  bool is_name_of_one(std::string_view name) const;
  void remove_if_left(const char* name) const noexcept;

  std::filesystem::path target_;
  Links links_;
  UniqueFd directory_;                   // Held, so that all steps are in the same one whatever it is called by then.
  std::optional<struct stat> replaced_;  // The last that was seen, or that a link led to.
  std::string prefix_;                   // What the names of all those for this target begin with.
  std::string name_;                     // In the directory. Empty: there is none.
};

}  // namespace flashpack::internal
