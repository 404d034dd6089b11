/// Finds out what a profile is kept for.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <filesystem>
#include <string>

#include "engine/mounts.h"
#include "flashpack/engine.h"

namespace flashpack::internal {

/// Two loads with the same values can have the same profile. All text is printable ASCII.
struct ProfileKey {
  std::string storage;  ///< The disk, or the source of a network file system.
  std::string file_system;
  std::string kernel;       ///< Major and minor version.
  std::string gpu;          ///< Empty for loads to the host.
  std::string unknown;      ///< Why this place could not be recognised later; empty if it could.
  bool on_network = false;  ///< Whether the storage is a server.
};

/// The key of loads of `path`, which need not exist yet, to `device`.
ProfileKey profile_key(std::filesystem::path path, Device device);

/// Whether the file system, which is on no disk of this machine, is a server's: its source is "host:/path" or
/// "//host/share", or its type is one whose source is a name that only it has on this machine.
bool is_on_network(const MountInfo& mount);

/// Returns a name that the disk has on every start of the machine, so that a profile is found again. `block` is the
/// disk's directory in /sys/block.
std::string disk_name(const std::filesystem::path& block);

}  // namespace flashpack::internal
