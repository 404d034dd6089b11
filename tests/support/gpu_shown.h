#pragma once

#include <sched.h>
#include <sys/mount.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>

namespace flashpack::testing {

/// From here on this process sees a driver with one GPU of that model, in /proc, and no other; for a child of
/// run_in_child(). False where that is not allowed.
inline bool show_gpu(const std::string& model) {
  const std::filesystem::path driver = "/proc/driver";
  if (::unshare(CLONE_NEWNS) != 0 || ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return false;
  if (::mount("none", driver.c_str(), "tmpfs", 0, nullptr) != 0) return false;
  const std::filesystem::path gpu = driver / "nvidia/gpus/0000:00:00.0";
  std::error_code error;
  std::filesystem::create_directories(gpu, error);
  return static_cast<bool>(std::ofstream(gpu / "information") << "Model: \t\t " << model << "\n");
}

}  // namespace flashpack::testing
