/// Lists the profiles in the user's file that no load on this machine uses.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "flashpack/tuning.h"

namespace flashpack::internal {

/// The profiles for the disk of `path` that neither loads to the host nor those to the GPUs of this machine can have,
/// as text for people: what each one has, and why it is ignored. None if the file of profiles cannot be read.
/// Any thread, unless another one changes the environment.
std::vector<std::string> ignored_profiles(const std::filesystem::path& path,
                                          const std::filesystem::path& profiles = profiles_path());

}  // namespace flashpack::internal
