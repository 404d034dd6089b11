#include "flashpack/tuning.h"

#include <algorithm>
#include <boost/json/array.hpp>
#include <cstdlib>
#include <string_view>

#include "engine/tuning/profile.h"
#include "engine/tuning/profile_key.h"
#include "engine/tuning/profiles_file.h"

namespace flashpack {

namespace {

namespace fs = std::filesystem;
namespace json = boost::json;
using internal::ProfileKey;

// Says why none of `profiles`, which are those of `file`, is for `key`.
void tell_why_none(TunedOptions& tuned, const json::array& profiles, const ProfileKey& key, const fs::path& file) {
  auto found = std::ranges::find_if(profiles, [&](const auto& each) { return internal::is_stale_for(each, key); });
  if (found != profiles.end()) tuned.use = ProfileUse::kIgnored;
  if (found == profiles.end())
    found = std::ranges::find_if(profiles, [&](const auto& each) { return internal::is_for_storage_of(each, key); });
  tuned.reason = found == profiles.end()
                     ? "no profile in " + file.string() + " is for " + key.storage
                     : "the profile in " + file.string() + " is " + internal::text_of_difference(*found, key);
}

}  // namespace

fs::path profiles_path() {
  const auto absolute = [](const char* name) {
    const char* const value = ::secure_getenv(name);
    return value != nullptr && *value == '/' ? fs::path(value) : fs::path();
  };
  fs::path config = absolute("XDG_CONFIG_HOME");
  if (config.empty() && !absolute("HOME").empty()) config = absolute("HOME") / ".config";
  return config.empty() ? config : config / "flashpack" / "tune.json";
}

TunedOptions tuned_options(const fs::path& path, Device device, const fs::path& profiles) {
  TunedOptions tuned;
  tuned.options.device = device;
  const char* const wish = ::secure_getenv("FLASHPACK_TUNE");
  if (wish != nullptr && std::string_view(wish) == "off") return tuned.reason = "FLASHPACK_TUNE=off", tuned;
  if (profiles.empty()) return tuned.reason = internal::kNoProfilesPath, tuned;
  const auto [all, reason, error, damaged] = internal::profiles_in(profiles);
  if (damaged) tuned.use = ProfileUse::kIgnored;
  if (!reason.empty()) return tuned.reason = reason, tuned;
  const ProfileKey key = internal::profile_key(path, device);
  if (!key.unknown.empty()) return tuned.reason = key.unknown, tuned;
  const json::value* const found =
      std::find_if(all.begin(), all.end(), [&](const auto& each) { return internal::is_for(each, key); });
  if (found == all.end()) return tell_why_none(tuned, all, key, profiles), tuned;
  tuned.use = ProfileUse::kUsed;
  if (internal::has_defaults(found->get_object()))
    return tuned.reason = "nothing was better than the defaults, says " + profiles.string(), tuned;
  tuned.applied = internal::take_values(found->get_object(), tuned.options);
  if (!tuned.applied) tuned.use = ProfileUse::kIgnored;
  tuned.reason = tuned.applied ? internal::text_of(tuned.options) + " of " + profiles.string()
                               : "values of the profile in " + profiles.string() + " are missing or out of range";
  return tuned;
}

}  // namespace flashpack
