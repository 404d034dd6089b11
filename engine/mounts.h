/// Finds the mount of a path without asking any file system, because one that does not answer would block.
#pragma once

#include <filesystem>
#include <istream>
#include <map>
#include <string>

namespace flashpack::internal {

/// A line of /proc/self/mountinfo, without the escapes.
struct MountInfo {
  std::string point;
  std::string file_system;
  std::string source;
};

/// The mounts of a process. Thread safety: as a standard container.
class Mounts {
 public:
  /// No mount is known.
  Mounts() = default;
  /// From lines as /proc/self/mountinfo has them.
  explicit Mounts(std::istream& mountinfo);

  /// Asks the kernel for the mounts of this process now; there are none if it does not tell.
  static Mounts of_process();

  /// The mount that `path` is in, without following links; null when none is known. Requires: an absolute path.
  const MountInfo* find(std::filesystem::path path) const;

 private:
  std::map<std::string, MountInfo> by_point_;
};

}  // namespace flashpack::internal
