#pragma once

#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <string>

namespace flashpack::testing {

struct Outcome {
  int status;
  std::string output;
};

/// Runs shell text, and gives its exit status (-1 for a signal) and standard output.
inline Outcome run(const std::string& command) {
  std::FILE* pipe = ::popen(command.c_str(), "r");
  if (pipe == nullptr) return {-1, "popen failed"};
  std::string output;
  std::array<char, 4096> buffer{};
  while (const std::size_t got = std::fread(buffer.data(), 1, buffer.size(), pipe)) output.append(buffer.data(), got);
  const int status = ::pclose(pipe);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, output};
}

}  // namespace flashpack::testing
