#include "engine/tuning/profile_key.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <set>
#include <string_view>

#include "engine/ground/first_line.h"

namespace flashpack::internal {

namespace {

namespace fs = std::filesystem;

// Returns the text without blanks at its ends, fit for JSON and terminals.
std::string printable(const std::string& text) {
  const auto begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string::npos) return {};
  std::string clean = text.substr(begin, text.find_last_not_of(" \t\r\n") + 1 - begin);
  for (char& c : clean) c = c < ' ' || c > '~' ? '?' : c;
  return clean;
}

std::string kernel() {
  utsname name{};
  ::uname(&name);
  const std::string release = name.release;
  const auto minor_end = release.find_first_not_of("0123456789", release.find('.') + 1);
  return printable(release.substr(0, minor_end));
}

// The models of all GPUs, because the number of a CUDA device depends on the environment, and to ask CUDA would make a
// context.
std::string gpu_models() {
  std::set<std::string> models;
  std::error_code error;
  for (fs::directory_iterator gpu("/proc/driver/nvidia/gpus", error), end; !error && gpu != end; gpu.increment(error)) {
    std::ifstream information(gpu->path() / "information");
    for (std::string line; std::getline(information, line);) {
      if (line.starts_with("Model:")) models.insert(printable(line.substr(6)));
    }
  }
  std::string all;
  for (const std::string& model : models) all += (all.empty() ? "" : " + ") + model;
  return all;
}

// The directory in /sys of a disk, or of the disk that a partition is on; empty if there is none.
fs::path block_directory(const std::string& device) {
  std::error_code error;
  const fs::path block = fs::canonical("/sys/dev/block/" + device, error);
  if (error) return {};
  return fs::exists(block / "partition", error) ? block.parent_path() : block;
}

fs::path block_directory(const MountInfo& mount) {
  if (fs::path block = block_directory(mount.device); !block.empty()) return block;
  // Btrfs has device numbers of its own, and names its disk.
  struct stat info{};
  if (!mount.source.starts_with("/dev/") || ::stat(mount.source.c_str(), &info) != 0 || !S_ISBLK(info.st_mode))
    return {};
  return block_directory(std::to_string(major(info.st_rdev)) + ":" + std::to_string(minor(info.st_rdev)));
}

// False, with errno, if there is nothing.
bool ask_mount(const fs::path& path, std::uint64_t& id) {
  struct statx info{};
  if (::statx(AT_FDCWD, path.c_str(), 0, STATX_MNT_ID, &info) != 0) return false;
  id = info.stx_mnt_id;
  return true;
}

}  // namespace

bool is_on_network(const MountInfo& mount) {
  // The sources of these types name no host, but one share or file system, and no other one of this machine. BeeGFS is
  // not among them, because all of its file systems have one source, nor is ZFS, because it may read from a cache of
  // its own in spite of O_DIRECT, so that not the disk would be measured.
  constexpr std::array<std::string_view, 4> kTypes{"virtiofs", "ceph", "gpfs", "wekafs"};
  if (std::ranges::find(kTypes, mount.file_system) != kTypes.end()) return true;
  return mount.source.find(':') != std::string::npos || mount.source.starts_with("//");
}

std::string disk_name(const fs::path& block) {
  std::string name;
  for (const char* file :
       {"wwid", "device/wwid", "serial", "device/serial", "dm/uuid", "md/uuid", "loop/backing_file"}) {
    name = printable(first_line(block / file));
    if (!name.empty()) break;
  }
  if (name.empty()) name = printable(block.filename().string());
  const std::string model = printable(first_line(block / "device/model"));
  const std::string sectors = printable(first_line(block / "size"));
  return name + (model.empty() ? "" : ", " + model) + ", " + sectors + " sectors";
}

ProfileKey profile_key(fs::path path, Device device) {
  ProfileKey key{.storage = "", .file_system = "", .kernel = kernel(), .gpu = "", .unknown = ""};
  if (path.empty()) path = ".";
  std::uint64_t id = 0;
  while (!ask_mount(path, id)) {
    const int error_number = errno;
    const fs::path above = path.has_parent_path() ? path.parent_path() : ".";
    if (error_number != ENOENT || above == path) {
      key.unknown = path.string() + ": " + std::generic_category().message(error_number);
      return key;
    }
    path = above;
  }
  const Mounts mounts = Mounts::of_process();
  const MountInfo* const found = mounts.find(id);
  const MountInfo mount = found ? *found : MountInfo{};
  key.file_system = printable(mount.file_system);
  if (const fs::path block = block_directory(mount); !block.empty()) {
    key.storage = disk_name(block);
  } else if (is_on_network(mount)) {
    key.storage = printable(mount.source);
    key.on_network = true;
  } else {
    key.unknown = (key.file_system.empty() ? "this file system" : key.file_system) +
                  " has no disk or server that could be recognised";
  }
  if (device.kind == Device::Kind::kCuda) {
    key.gpu = gpu_models();
    if (key.gpu.empty()) key.unknown = "the driver names no GPU that could be recognised";
  }
  return key;
}

}  // namespace flashpack::internal
