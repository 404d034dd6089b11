#include "flashpack/tuning.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <boost/json/array.hpp>
#include <boost/json/object.hpp>
#include <boost/json/parse.hpp>
#include <boost/json/serialize.hpp>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "engine/ground/error.h"
#include "engine/ground/option_limits.h"
#include "engine/ground/unique_fd.h"
#include "engine/tuning/profile_key.h"

namespace flashpack {

namespace {

namespace fs = std::filesystem;
namespace json = boost::json;
using internal::argument_error;
using internal::errno_code;
using internal::file_error;
using internal::ProfileKey;

constexpr std::string_view kDefaults = "defaults";
constexpr std::string_view kStaging = "staging_bytes";
constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
// Far more than a person's profiles take. A larger file is not one of ours.
constexpr std::uint64_t kMaxFileBytes = kMiB;
// A file that somebody has edited may not make the engine take more memory for its slots.
constexpr std::uint64_t kMaxStagingBytes = 1024 * kMiB;

// The four values that a profile is found by.
std::array<std::pair<const char*, std::string>, 4> values_of(const ProfileKey& key) {
  return {{{"storage", key.storage}, {"file_system", key.file_system}, {"kernel", key.kernel}, {"gpu", key.gpu}}};
}

std::string text_at(const json::object& profile, std::string_view name) {
  const json::value* const value = profile.if_contains(name);
  return value != nullptr && value->is_string() ? std::string(value->get_string()) : std::string();
}

// The first name in the key of which the profile has another value; null if they are the same.
const char* difference(const json::value& profile, const ProfileKey& key) {
  if (!profile.is_object()) return "storage";
  for (const auto& [name, value] : values_of(key)) {
    if (text_at(profile.get_object(), name) != value) return name;
  }
  return nullptr;
}

// The values of a profile as a file may have them. No staging_bytes are those that need no number.
struct Values {
  std::uint64_t chunk_bytes;
  std::uint64_t queue_depth;
  std::uint64_t workers;
  std::uint64_t staging_bytes;
};

Values values_of(const EngineOptions& options) {
  return {options.chunk_bytes, options.queue_depth, options.workers, options.staging_bytes};
}

// An engine has at least two slots, and room for all reads in flight unless its staging memory is given.
std::uint64_t least_staging_bytes(const Values& values) {
  return values.chunk_bytes * std::max<std::uint64_t>(values.queue_depth, internal::kMinSlots);
}

bool in_range(const Values& values) {
  if (!internal::is_chunk_size(values.chunk_bytes) || !internal::is_queue_depth(values.queue_depth) ||
      !internal::is_number_of_workers(values.workers))
    return false;
  if (values.staging_bytes == 0) return least_staging_bytes(values) <= kMaxStagingBytes;
  return values.staging_bytes <= kMaxStagingBytes &&
         internal::is_number_of_slots(values.staging_bytes / values.chunk_bytes);
}

// The staging memory of a profile that has no number for it; 0 is the engine's own.
std::uint64_t staging_bytes_without(const Values& values, Device::Kind kind) {
  const std::uint64_t wanted_bytes = least_staging_bytes(values);
  return wanted_bytes > internal::usual_staging_bytes(kind) ? wanted_bytes : 0;
}

// Whether the profile needs a number for the staging memory.
bool has_own_staging(const EngineOptions& options) {
  const std::uint64_t usual_bytes = internal::usual_staging_bytes(options.device.kind);
  const std::uint64_t without = staging_bytes_without(values_of(options), options.device.kind);
  return options.staging_bytes != 0 && options.staging_bytes != (without == 0 ? usual_bytes : without);
}

bool are_usual(const EngineOptions& options) {
  const EngineOptions usual;
  return options.chunk_bytes == usual.chunk_bytes && options.queue_depth == usual.queue_depth &&
         options.workers == usual.workers && !has_own_staging(options);
}

// Whether the profile says that nothing was better than the defaults, whatever they are.
bool has_defaults(const json::object& profile) {
  const json::value* const value = profile.if_contains(kDefaults);
  return value != nullptr && value->is_bool() && value->get_bool();
}

// Puts the values of the profile in place of those of `options`. False if one is missing or out of range.
bool take_values(const json::object& profile, EngineOptions& options) {
  const auto number = [&](std::string_view name) {
    json::error_code error;
    const json::value* const value = profile.if_contains(name);
    const std::uint64_t found = value == nullptr ? ~std::uint64_t{0} : value->to_number<std::uint64_t>(error);
    return error ? ~std::uint64_t{0} : found;
  };
  const std::uint64_t staging_bytes = profile.contains(kStaging) ? number(kStaging) : 0;
  const Values values{number("chunk_bytes"), number("queue_depth"), number("workers"), staging_bytes};
  if (!in_range(values)) return false;
  options.chunk_bytes = static_cast<std::uint32_t>(values.chunk_bytes);
  options.queue_depth = static_cast<std::uint32_t>(values.queue_depth);
  options.workers = static_cast<std::uint32_t>(values.workers);
  options.staging_bytes = staging_bytes == 0 ? staging_bytes_without(values, options.device.kind) : staging_bytes;
  return true;
}

std::string text_of(const EngineOptions& options) {
  const std::string workers = options.workers == 0 ? "" : ", " + std::to_string(options.workers) + " workers";
  const std::string staging =
      has_own_staging(options) ? ", " + std::to_string(options.staging_bytes / kMiB) + " MiB of staging" : "";
  return std::to_string(options.chunk_bytes / kMiB) + " MiB x " + std::to_string(options.queue_depth) + workers +
         staging;
}

struct Profiles {
  json::array all;
  std::string reason;     // Why there are none to read; empty if there are.
  std::error_code error;  // Of the system; none if the file is missing or damaged.
};

// The text of a file, cut after kMaxFileBytes + 1.
std::string text_in(const fs::path& file, std::error_code& error) {
  // A FIFO would make a plain open wait for a writer.
  const internal::UniqueFd fd(::open(file.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
  std::string text(kMaxFileBytes + 1, '\0');
  std::size_t size = 0;
  ssize_t got = fd ? 1 : -1;
  while (got > 0 && size < text.size()) {
    got = internal::uninterrupted([&] { return ::read(fd.get(), text.data() + size, text.size() - size); });
    if (got > 0) size += static_cast<std::size_t>(got);
  }
  if (got < 0) error = errno_code(errno);
  text.resize(size);
  return text;
}

Profiles profiles_in(const fs::path& file) {
  Profiles profiles;
  const std::string text = text_in(file, profiles.error);
  if (profiles.error == std::errc::no_such_file_or_directory) return {{}, "there is no " + file.string(), {}};
  profiles.reason = file.string() + " cannot be read: " + profiles.error.message();
  if (profiles.error) return profiles;
  json::error_code damage;
  json::value document;
  if (text.size() <= kMaxFileBytes) document = json::parse(text, damage);
  json::value* const found = document.is_object() ? document.get_object().if_contains("profiles") : nullptr;
  profiles.reason = file.string() + " is damaged" + (damage ? ": " + damage.message() : "");
  if (found == nullptr || !found->is_array()) return profiles;
  return {std::move(found->get_array()), {}, {}};
}

// Why none of `profiles` is for `key`.
std::string why_none(const json::array& profiles, const ProfileKey& key) {
  for (const json::value& profile : profiles) {
    const std::string name = difference(profile, key);
    if (name == "storage") continue;
    for (const auto& [each, here] : values_of(key)) {
      if (each != name) continue;
      return "the profile is for " + name + " \"" + text_at(profile.get_object(), name) + "\", and here it is \"" +
             here + "\"";
    }
  }
  return "no profile is for " + key.storage;
}

// The defaults are not written down, because those of a later version may be better ones.
json::object profile_of(const ProfileKey& key, const EngineOptions& options) {
  json::object profile;
  for (const auto& [name, value] : values_of(key)) profile[name] = value;
  if (are_usual(options)) {
    profile[kDefaults] = true;
    return profile;
  }
  profile["chunk_bytes"] = options.chunk_bytes;
  profile["queue_depth"] = options.queue_depth;
  profile["workers"] = options.workers;
  if (has_own_staging(options)) profile[kStaging] = options.staging_bytes;
  return profile;
}

// Replaces `file`, or what it links to, at once.
void replace(const fs::path& file, const std::string& text) {
  std::error_code ignored;
  const fs::path target = fs::exists(file, ignored) ? fs::canonical(file, ignored) : file;
  std::string name = target.string() + ".XXXXXX";
  internal::UniqueFd fd(::mkostemp(name.data(), O_CLOEXEC));
  if (!fd) throw file_error(errno_code(errno), "create", name);
  const ssize_t written = ::write(fd.get(), text.data(), text.size());
  const bool whole = written == static_cast<ssize_t>(text.size());
  if (!whole || ::fsync(fd.get()) != 0 || ::rename(name.c_str(), target.c_str()) != 0) {
    const int error_number = whole || written < 0 ? errno : ENOSPC;
    ::unlink(name.c_str());
    throw file_error(errno_code(error_number), "write", target);
  }
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
  const auto [all, reason, ignored] = profiles_in(profiles);
  if (!reason.empty()) return tuned.reason = reason, tuned;
  const ProfileKey key = internal::profile_key(path, device);
  if (!key.unknown.empty()) return tuned.reason = key.unknown, tuned;
  const json::value* const found =
      std::find_if(all.begin(), all.end(), [&](const auto& each) { return difference(each, key) == nullptr; });
  if (found == all.end()) return tuned.reason = why_none(all, key), tuned;
  if (has_defaults(found->get_object()))
    return tuned.reason = "nothing was better than the defaults, says " + profiles.string(), tuned;
  tuned.applied = take_values(found->get_object(), tuned.options);
  tuned.reason = tuned.applied ? text_of(tuned.options) + " of " + profiles.string()
                               : "values of the profile in " + profiles.string() + " are missing or out of range";
  return tuned;
}

void keep_profile(const fs::path& path, const EngineOptions& options, const fs::path& profiles) {
  if (!in_range(values_of(options))) throw argument_error("options of a profile are out of range: " + text_of(options));
  if (profiles.empty()) throw argument_error("neither XDG_CONFIG_HOME nor HOME says where profiles are");
  const ProfileKey key = internal::profile_key(path, options.device);
  if (!key.unknown.empty()) throw argument_error("no profile can be kept: " + key.unknown);
  const fs::path directory = profiles.parent_path();
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) throw file_error(error, "create", directory);
  const internal::UniqueFd lock(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // Without a lock, as some network file systems have none, another profile may be lost, but no file is damaged.
  internal::uninterrupted([&] { return ::flock(lock.get(), LOCK_EX); });
  auto [all, damage, read_error] = profiles_in(profiles);
  if (read_error) throw file_error(read_error, "read", profiles);
  if (!damage.empty() && fs::exists(profiles, error))
    throw argument_error("no profile can be kept: " + damage + "; mend it or remove it");
  all.erase(std::remove_if(all.begin(), all.end(), [&](const auto& each) { return difference(each, key) == nullptr; }),
            all.end());
  all.push_back(profile_of(key, options));
  replace(profiles, json::serialize(json::object{{"profiles", std::move(all)}}) + "\n");
}

}  // namespace flashpack
