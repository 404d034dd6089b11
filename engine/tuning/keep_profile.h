/// Keeps what flashpack_tune has found.
#pragma once

#include <filesystem>
#include <string>

#include "flashpack/engine.h"
#include "flashpack/tuning.h"

namespace flashpack::internal {

/// Keeps chunk_bytes, queue_depth, workers, staging_bytes if it is not 0, and the backend if it is kWorkers, of
/// `options` for loads of `path` to `options.device`, in place of the profile that there was for it. The file is
/// replaced at once, and processes that do so at the same time do not lose each other's profiles. Options with the
/// default values are kept as "the defaults", not as numbers. Throws: Error (kInvalidArgument if the options are out of
/// range, loads of `path` have no key that could be recognised, as on tmpfs, or the file is damaged, because its other
/// profiles would be lost; errno when the file cannot be read or written). Any thread, unless another one changes the
/// environment.
void keep_profile(const std::filesystem::path& path, const EngineOptions& options,
                  const std::filesystem::path& profiles = profiles_path());

/// Why keep_profile() would keep none for loads of `path` to `device`, as text for people, as far as that is known
/// without writing; empty if nothing is in the way. For a caller who would find out after a long measurement. Any
/// thread, unless another one changes the environment.
std::string why_none_is_kept(const std::filesystem::path& path, Device device,
                             const std::filesystem::path& profiles = profiles_path());

}  // namespace flashpack::internal
