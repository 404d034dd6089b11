#include "engine/tuning/profile.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

#include "engine/ground/option_limits.h"
#include "engine/ground/units.h"

namespace flashpack::internal {

namespace {

namespace json = boost::json;

constexpr const char* kStorage = "storage";
constexpr const char* kFileSystem = "file_system";
constexpr const char* kGpu = "gpu";
constexpr std::string_view kDefaults = "defaults";
constexpr std::string_view kStagingBytes = "staging_bytes";
constexpr std::string_view kBackend = "backend";
// A file that somebody has edited may not make the engine take more memory for its slots.
constexpr std::uint64_t kMaxStagingBytes = 1024 * kMiB;

// The values of a profile as a file may have them. staging_bytes is 0 if the profile has no number for it.
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
  return values.chunk_bytes * std::max<std::uint64_t>(values.queue_depth, kMinSlots);
}

bool in_range(const Values& values) {
  if (!is_chunk_size(values.chunk_bytes) || !is_queue_depth(values.queue_depth) ||
      !is_number_of_workers(values.workers))
    return false;
  if (values.staging_bytes == 0) return least_staging_bytes(values) <= kMaxStagingBytes;
  return values.staging_bytes <= kMaxStagingBytes && is_number_of_slots(values.staging_bytes / values.chunk_bytes);
}

// The staging memory of a profile that has no number for it; 0 is the engine's own.
std::uint64_t staging_bytes_without(const Values& values, Device::Kind kind) {
  const std::uint64_t wanted_bytes = least_staging_bytes(values);
  return wanted_bytes > usual_staging_bytes(kind) ? wanted_bytes : 0;
}

// The backend of a profile; nothing if no profile may have it.
std::optional<Backend> backend_of(const json::object& profile) {
  const json::value* const value = profile.if_contains(kBackend);
  if (value == nullptr) return Backend::kAuto;
  if (value->is_string() && value->get_string() == to_string(Backend::kWorkers)) return Backend::kWorkers;
  return {};
}

// Whether the profile needs a number for the staging memory.
bool has_own_staging(const EngineOptions& options) {
  const std::uint64_t usual_bytes = usual_staging_bytes(options.device.kind);
  const std::uint64_t without = staging_bytes_without(values_of(options), options.device.kind);
  return options.staging_bytes != 0 && options.staging_bytes != (without == 0 ? usual_bytes : without);
}

bool are_usual(const EngineOptions& options) {
  const EngineOptions usual;
  return options.backend == usual.backend && options.chunk_bytes == usual.chunk_bytes &&
         options.queue_depth == usual.queue_depth && options.workers == usual.workers && !has_own_staging(options);
}

// The names and the values that a profile is found by.
std::array<std::pair<const char*, std::string>, 4> values_of(const ProfileKey& key) {
  return {{{kStorage, key.storage}, {kFileSystem, key.file_system}, {"kernel", key.kernel}, {kGpu, key.gpu}}};
}

// The text of this name in the profile; empty if there is none.
std::string text_at(const json::value& profile, std::string_view name) {
  const json::object* const object = profile.if_object();
  const json::value* const value = object == nullptr ? nullptr : object->if_contains(name);
  return value != nullptr && value->is_string() ? std::string(value->get_string()) : std::string();
}

// The name, and the value here, of the first difference; no name if there is none.
std::pair<const char*, std::string> first_difference(const json::value& profile, const ProfileKey& key) {
  for (const auto& [name, value] : values_of(key)) {
    if (!profile.is_object() || text_at(profile, name) != value) return {name, value};
  }
  return {};
}

}  // namespace

bool is_for(const json::value& profile, const ProfileKey& key) {
  return first_difference(profile, key).first == nullptr;
}

bool is_for_storage_of(const json::value& profile, const ProfileKey& key) {
  return profile.is_object() && text_at(profile, kStorage) == key.storage;
}

bool is_stale_for(const json::value& profile, const ProfileKey& key) {
  return is_for_storage_of(profile, key) && text_at(profile, kFileSystem) == key.file_system &&
         is_for_gpu(profile) != key.gpu.empty() && !is_for(profile, key);
}

bool is_for_gpu(const json::value& profile) { return !text_at(profile, kGpu).empty(); }

std::string text_of_difference(const json::value& profile, const ProfileKey& key) {
  const auto [name, here] = first_difference(profile, key);
  if (name == nullptr) return {};
  return std::string("for ") + name + " \"" + text_at(profile, name) + "\", and here it is " +
         (here.empty() ? "none" : "\"" + here + "\"");
}

bool is_in_range(const EngineOptions& options) {
  return in_range(values_of(options)) && (options.backend == Backend::kAuto || options.backend == Backend::kWorkers);
}

bool has_defaults(const json::object& profile) {
  const json::value* const value = profile.if_contains(kDefaults);
  return value != nullptr && value->is_bool() && value->get_bool();
}

bool take_values(const json::object& profile, EngineOptions& options) {
  const auto number = [&](std::string_view name) {
    json::error_code error;
    const json::value* const value = profile.if_contains(name);
    const std::uint64_t found = value == nullptr ? ~std::uint64_t{0} : value->to_number<std::uint64_t>(error);
    return error ? ~std::uint64_t{0} : found;
  };
  const std::uint64_t staging_bytes = profile.contains(kStagingBytes) ? number(kStagingBytes) : 0;
  const Values values{number("chunk_bytes"), number("queue_depth"), number("workers"), staging_bytes};
  const std::optional<Backend> backend = backend_of(profile);
  if (!in_range(values) || !backend) return false;
  options.backend = *backend;
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
         staging + (options.backend == Backend::kWorkers ? ", reads by the workers" : "");
}

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
  if (has_own_staging(options)) profile[kStagingBytes] = options.staging_bytes;
  if (options.backend != Backend::kAuto) profile[kBackend] = to_string(options.backend);
  return profile;
}

}  // namespace flashpack::internal
