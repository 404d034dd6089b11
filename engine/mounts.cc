#include "engine/mounts.h"

#include <charconv>
#include <fstream>
#include <limits>

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

void Mounts::read() {
  points_.clear();
  std::ifstream lines("/proc/self/mountinfo");
  std::string id, parent, device, root, point;
  while (lines >> id >> parent >> device >> root >> point) {
    points_.insert(unescaped(point));
    lines.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
}

std::string Mounts::above(std::filesystem::path directory) const {
  while (!points_.contains(directory.native())) {
    if (!directory.has_relative_path()) return {};
    directory = directory.parent_path();
  }
  return directory.native();
}

}  // namespace flashpack::internal
