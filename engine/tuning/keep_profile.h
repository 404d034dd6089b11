/// Keeps what flashpack_tune has found.
#pragma once

#include <filesystem>

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

}  // namespace flashpack::internal
