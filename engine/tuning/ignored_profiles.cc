#include "engine/tuning/ignored_profiles.h"

#include <array>

#include "engine/tuning/profile.h"
#include "engine/tuning/profile_key.h"
#include "engine/tuning/profiles_file.h"

namespace flashpack::internal {

namespace {

// Returns the options that the profile gives to loads to such a device, as text.
std::string values_of(const boost::json::object& profile, Device device) {
  EngineOptions options;
  options.device = device;
  if (has_defaults(profile)) return "the defaults";
  return take_values(profile, options) ? text_of(options) : "values that are missing or out of range";
}

}  // namespace

std::vector<std::string> ignored_profiles(const std::filesystem::path& path, const std::filesystem::path& profiles) {
  constexpr Device kHost;
  constexpr Device kGpu{.kind = Device::Kind::kCuda};
  const std::array keys{profile_key(path, kHost), profile_key(path, kGpu)};
  std::vector<std::string> ignored;
  if (!keys.front().unknown.empty()) return ignored;
  for (const boost::json::value& profile : profiles_in(profiles).all) {
    if (is_for(profile, keys[0]) || is_for(profile, keys[1])) continue;
    const ProfileKey& key = keys[is_for_gpu(profile) ? 1 : 0];
    if (!is_for_storage_of(profile, key)) continue;
    ignored.push_back(values_of(profile.get_object(), is_for_gpu(profile) ? kGpu : kHost) + " " +
                      text_of_difference(profile, key));
  }
  return ignored;
}

}  // namespace flashpack::internal
