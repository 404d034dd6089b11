/// Facts that the kernel gives as text.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <filesystem>
#include <fstream>
#include <string>

namespace flashpack::internal {

/// The first line of a file of /proc or /sys; empty if there is none.
inline std::string first_line(const std::filesystem::path& path) {
  std::string line;
  std::getline(std::ifstream(path), line);
  return line;
}

}  // namespace flashpack::internal
