/// How much of the machine's CPUs a control group leaves to this process.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <filesystem>
#include <optional>
#include <sstream>

#include "engine/ground/first_line.h"

namespace flashpack::internal {

/// Returns the number of CPUs that this process may keep busy on average, as a container's limit says; nothing without
/// a limit. The limit of a group within the container, or of one outside of a container, is not seen.
inline std::optional<double> cpu_quota(const std::filesystem::path& cpu_max = "/sys/fs/cgroup/cpu.max") {
  std::istringstream quota(first_line(cpu_max));
  double quota_us = 0;
  double period_us = 0;
  if (!(quota >> quota_us >> period_us) || period_us <= 0) return std::nullopt;
  return quota_us / period_us;
}

}  // namespace flashpack::internal
