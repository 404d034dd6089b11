/// The options that flashpack_tune has found to be the best ones for a disk, and has kept for the loads to come.
///
///   flashpack::Engine engine(flashpack::tuned_options("/models/model.flashpack").options);
///
/// A profile is the chunk_bytes, queue_depth and workers of EngineOptions, for one key: a disk or network file
/// system, the type of the file system, the version of the kernel and the GPU. It also has staging_bytes where other
/// memory than the usual was better, as for a GPU; if it is absent, staging is large enough for all reads in flight.
/// Its backend is Backend::kWorkers where `flashpack_tune --backend` found that faster, and else the engine's choice:
/// no profile forces io_uring, which a container may refuse. A profile does not say how a load uses the page cache,
/// because LoadRequest::cache belongs to a load, not to an engine. A profile is applied only where all values of its
/// key are the same. A key for which nothing was better than the defaults has a profile without numbers, and so gets
/// the defaults of later versions, too. The file of profiles is the user's, JSON, and may be edited.
///
/// An engine does not know where its options come from, and neither do the figures of its transfers: TunedOptions says
/// it, for the program's own log.
///
/// A profile takes at most 1 GiB of staging memory. Where an engine cannot be made with it, as under a limit on memory
/// or threads, one with the defaults still may be.
#pragma once

#include <filesystem>
#include <string>

#include "flashpack/engine.h"

namespace flashpack {

/// Whether loads use a profile. The one who tuned the machine should hear of a profile that is ignored.
enum class ProfileUse {
  kNone,     ///< There is none that can be read, or FLASHPACK_TUNE=off turns profiles off.
  kUsed,     ///< It was applied, or says that nothing was better than the defaults.
  kIgnored,  ///< It is for another kernel or GPU or has no values that an engine takes, or the file is damaged.
};

struct TunedOptions {
  EngineOptions options;  ///< The profile's if `applied`, else the defaults; `device` is the given one.
  bool applied = false;
  std::string reason;  ///< For people: why no profile was applied, or which one was.
  ProfileUse use = ProfileUse::kNone;
};

/// The file of profiles: $XDG_CONFIG_HOME/flashpack/tune.json, else $HOME/.config/flashpack/tune.json. Empty if neither
/// variable is an absolute path. The file need not exist.
std::filesystem::path profiles_path();

/// Returns the options for loads of `path`, which is a file or a directory, to `device`. A profile that is missing,
/// made for another key or damaged is no error: the options are the defaults then, as they are if nothing was better
/// or FLASHPACK_TUNE=off is in the environment. Any thread, unless another one changes the environment.
TunedOptions tuned_options(const std::filesystem::path& path, Device device = {},
                           const std::filesystem::path& profiles = profiles_path());

}  // namespace flashpack
