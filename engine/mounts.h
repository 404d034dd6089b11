/// Which file system a path leads to, as far as that can be told without asking any.
#pragma once

#include <filesystem>
#include <set>
#include <string>

namespace flashpack::internal {

/// The mount points of this process.
class Mounts {
 public:
  /// Asks the kernel for those of now; there are none where it does not tell.
  void read();

  /// The mount point that `directory` is at or below, without looking at links; empty when none is known. Requires: an
  /// absolute path.
  std::string above(std::filesystem::path directory) const;

 private:
  std::set<std::string> points_;
};

}  // namespace flashpack::internal
