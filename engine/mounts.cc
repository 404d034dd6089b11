#include "engine/mounts.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <sstream>
#include <utility>

namespace flashpack::internal {

namespace {

// The kernel writes blanks and backslashes as a backslash and three octal digits.
std::string unescaped(const std::string& text) {
  std::string plain;
  for (std::size_t i = 0; i < text.size(); ++i) {
    unsigned code = 0;
    const char* const digits = text.data() + i + 1;
    const bool escaped =
        text[i] == '\\' && i + 3 < text.size() && std::from_chars(digits, digits + 3, code, 8).ptr == digits + 3;
    plain += escaped ? static_cast<char>(code) : text[i];
    if (escaped) i += 3;
  }
  return plain;
}

}  // namespace

Mounts::Mounts(std::istream& mountinfo) {
  for (std::string line; std::getline(mountinfo, line);) {
    const auto separator = line.find(" - ");  // Optional fields end here.
    if (separator == std::string::npos) continue;
    std::string skipped;
    MountInfo mount;
    std::istringstream(line) >> mount.id >> skipped >> mount.device >> skipped >> mount.point;
    std::istringstream(line.substr(separator + 3)) >> mount.file_system >> mount.source;
    mount.point = unescaped(mount.point);
    mount.source = unescaped(mount.source);
    by_point_[mount.point] = all_.size();  // A later mount at the same point hides others.
    all_.push_back(std::move(mount));
  }
}

Mounts Mounts::of_process() {
  std::ifstream mountinfo("/proc/self/mountinfo");
  return Mounts(mountinfo);
}

const MountInfo* Mounts::find(std::filesystem::path path) const {
  while (true) {
    if (const auto mount = by_point_.find(path.native()); mount != by_point_.end()) return &all_[mount->second];
    if (!path.has_relative_path()) return nullptr;
    path = path.parent_path();
  }
}

const MountInfo* Mounts::find(std::uint64_t id) const {
  const auto mount = std::ranges::find(all_, id, &MountInfo::id);
  return mount == all_.end() ? nullptr : &*mount;
}

}  // namespace flashpack::internal
