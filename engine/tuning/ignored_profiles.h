/// Lists the profiles in the user's file that no load on this machine uses.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "flashpack/tuning.h"

namespace flashpack::internal {

/// The profiles for the disk of `path` that no load on this machine can use, to the host or to a GPU, as text for
/// people: what each one has, and why it is ignored. None if the file of profiles cannot be read.
/// Any thread, unless another one changes the environment.
std::vector<std::string> ignored_profiles(const std::filesystem::path& path,
                                          const std::filesystem::path& profiles = profiles_path());

}  // namespace flashpack::internal
