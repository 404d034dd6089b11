#pragma once

#include <cstddef>
#include <filesystem>
#include <system_error>

namespace flashpack::testing {

/// How many descriptors of this process are open on files whose paths begin with `path`.
inline std::ptrdiff_t open_descriptors_of(const std::filesystem::path& path) {
  std::ptrdiff_t found = 0;
  std::error_code gone;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
    found += std::filesystem::read_symlink(entry.path(), gone).native().starts_with(path.native());
  return found;
}

}  // namespace flashpack::testing
