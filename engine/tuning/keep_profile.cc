#include "engine/tuning/keep_profile.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "engine/ground/error.h"
#include "engine/ground/system_call.h"
#include "engine/ground/unique_fd.h"
#include "engine/tuning/profile.h"
#include "engine/tuning/profile_key.h"
#include "engine/tuning/profiles_file.h"

namespace flashpack::internal {

namespace {

namespace fs = std::filesystem;

// A damaged file may hold other profiles, which would be lost.
std::string why_not_replaced(const Profiles& damaged) { return damaged.reason + "; mend it or remove it"; }

}  // namespace

std::string why_none_is_kept(const fs::path& path, Device device, const fs::path& profiles) {
  if (profiles.empty()) return kNoProfilesPath;
  if (const ProfileKey key = profile_key(path, device); !key.unknown.empty()) return key.unknown;
  const Profiles there = profiles_in(profiles);
  if (there.error) return there.reason;
  if (there.damaged) return why_not_replaced(there);
  fs::path directory = profiles.parent_path();
  std::error_code ignored;
  while (directory.has_relative_path() && !fs::exists(directory, ignored)) directory = directory.parent_path();
  if (::access(directory.c_str(), W_OK | X_OK) != 0)
    return directory.string() + " cannot be written: " + errno_code(errno).message();
  return {};
}

void keep_profile(const std::filesystem::path& path, const EngineOptions& options,
                  const std::filesystem::path& profiles) {
  if (!is_in_range(options)) throw argument_error("options of a profile are out of range: " + text_of(options));
  if (profiles.empty()) throw argument_error(kNoProfilesPath);
  const ProfileKey key = profile_key(path, options.device);
  if (!key.unknown.empty()) throw argument_error("no profile can be kept: " + key.unknown);
  const std::filesystem::path directory = profiles.parent_path();
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) throw file_error(error, "create", directory);
  const UniqueFd lock(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // Without a lock, as some network file systems have none, another profile may be lost, but no file is damaged.
  uninterrupted([&] { return ::flock(lock.get(), LOCK_EX); });
  Profiles there = profiles_in(profiles);
  if (there.error) throw file_error(there.error, "read", profiles);
  if (there.damaged) throw argument_error("no profile can be kept: " + why_not_replaced(there));
  auto& all = there.all;
  all.erase(std::remove_if(all.begin(), all.end(), [&](const auto& each) { return is_for(each, key); }), all.end());
  all.push_back(profile_of(key, options));
  replace_profiles(profiles, std::move(all));
}

}  // namespace flashpack::internal
