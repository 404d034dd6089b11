/// Finds the mount point of a path without asking any file system, because one that does not answer would block.
#pragma once

#include <filesystem>
#include <set>
#include <string>

namespace flashpack::internal {

/// The mount points of this process.
class Mounts {
 public:
  /// Reads the current mount points from the kernel; there are none if it does not tell.
  void read();

  /// The mount point that `directory` is at or below, without following links; empty when none is known. Requires: an
  /// absolute path.
  std::string above(std::filesystem::path directory) const;

 private:
  std::set<std::string> points_;
};

}  // namespace flashpack::internal
