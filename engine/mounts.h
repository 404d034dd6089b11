/// The mounts of this process, which the kernel tells without asking any file system, because one that does not answer
/// would block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <istream>
#include <map>
#include <string>
#include <vector>

namespace flashpack::internal {

/// A line of /proc/self/mountinfo, without the escapes.
struct MountInfo {
  std::uint64_t id = 0;  ///< As statx gives it for STATX_MNT_ID.
  std::string device;    ///< "MAJOR:MINOR".
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
  /// The mount with that number; null if it is not there.
  const MountInfo* find(std::uint64_t id) const;

 private:
  std::vector<MountInfo> all_;
  std::map<std::string, std::size_t> by_point_;  // Indices into all_.
};

}  // namespace flashpack::internal
