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

// Why none of `profiles` is for `key`.
std::string why_none(const json::array& profiles, const ProfileKey& key) {
  for (const json::value& profile : profiles) {
    const std::string name = internal::difference(profile, key);
    if (name == "storage") continue;
    for (const auto& [each, here] : internal::values_of(key)) {
      if (each != name) continue;
      return "the profile is for " + name + " \"" + internal::text_at(profile, name) + "\", and here it is \"" + here +
             "\"";
    }
  }
  return "no profile is for " + key.storage;
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
  if (profiles.empty()) return tuned.reason = "neither XDG_CONFIG_HOME nor HOME says where profiles are", tuned;
  const auto [all, reason, ignored] = internal::profiles_in(profiles);
  if (!reason.empty()) return tuned.reason = reason, tuned;
  const ProfileKey key = internal::profile_key(path, device);
  if (!key.unknown.empty()) return tuned.reason = key.unknown, tuned;
  const json::value* const found = std::find_if(
      all.begin(), all.end(), [&](const auto& each) { return internal::difference(each, key) == nullptr; });
  if (found == all.end()) return tuned.reason = why_none(all, key), tuned;
  if (internal::has_defaults(found->get_object()))
    return tuned.reason = "nothing was better than the defaults, says " + profiles.string(), tuned;
  tuned.applied = internal::take_values(found->get_object(), tuned.options);
  tuned.reason = tuned.applied ? internal::text_of(tuned.options) + " of " + profiles.string()
                               : "values of the profile in " + profiles.string() + " are missing or out of range";
  return tuned;
}

}  // namespace flashpack
