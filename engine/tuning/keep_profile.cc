#include "engine/tuning/keep_profile.h"

#include <fcntl.h>
#include <sys/file.h>

#include <algorithm>
#include <utility>

#include "engine/ground/error.h"
#include "engine/ground/system_call.h"
#include "engine/ground/unique_fd.h"
#include "engine/tuning/profile.h"
#include "engine/tuning/profile_key.h"
#include "engine/tuning/profiles_file.h"

namespace flashpack::internal {

void keep_profile(const std::filesystem::path& path, const EngineOptions& options,
                  const std::filesystem::path& profiles) {
  if (!is_in_range(options)) throw argument_error("options of a profile are out of range: " + text_of(options));
  if (profiles.empty()) throw argument_error("neither XDG_CONFIG_HOME nor HOME says where profiles are");
  const ProfileKey key = profile_key(path, options.device);
  if (!key.unknown.empty()) throw argument_error("no profile can be kept: " + key.unknown);
  const std::filesystem::path directory = profiles.parent_path();
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) throw file_error(error, "create", directory);
  const UniqueFd lock(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // Without a lock, as some network file systems have none, another profile may be lost, but no file is damaged.
  uninterrupted([&] { return ::flock(lock.get(), LOCK_EX); });
  auto [all, damage, read_error] = profiles_in(profiles);
  if (read_error) throw file_error(read_error, "read", profiles);
  if (!damage.empty() && std::filesystem::exists(profiles, error))
    throw argument_error("no profile can be kept: " + damage + "; mend it or remove it");
  all.erase(std::remove_if(all.begin(), all.end(), [&](const auto& each) { return is_for(each, key); }), all.end());
  all.push_back(profile_of(key, options));
  replace_profiles(profiles, std::move(all));
}

}  // namespace flashpack::internal
