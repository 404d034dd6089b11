/// One profile of the file: which loads it is for, and the options that it has for them.
///
/// Thread safety: any thread may call any function; the objects are standard containers.
#pragma once

#include <boost/json/object.hpp>
#include <boost/json/value.hpp>
#include <string>
#include <string_view>

#include "engine/tuning/profile_key.h"
#include "flashpack/engine.h"

namespace flashpack::internal {

/// The text of this name in the profile; empty if there is none.
std::string text_at(const boost::json::value& profile, std::string_view name);

/// The first name in the key of which the profile has another value; null if they are the same. A value that is
/// not a JSON object counts as different in its storage.
const char* difference(const boost::json::value& profile, const ProfileKey& key);

/// The same as text: `for kernel "6.1", and here it is "6.18"`. Empty if they are the same.
std::string text_of_difference(const boost::json::value& profile, const ProfileKey& key);

/// Whether a profile may have these options. Its backend is the engine's choice or the workers, which any system
/// allows. Where io_uring is refused, an engine that is told to use it throws, so that no profile forces it.
bool is_in_range(const EngineOptions& options);

/// Whether the profile says that nothing was better than the defaults, whatever they are.
bool has_defaults(const boost::json::object& profile);

/// Puts the values of the profile in place of those of `options`, whose device stays. False, and nothing is changed, if
/// one is missing or out of range.
bool take_values(const boost::json::object& profile, EngineOptions& options);

/// "4 MiB x 8", and what else is not left to the engine.
std::string text_of(const EngineOptions& options);

/// The profile that has these options for `key`. The defaults are not written down, because those of a later version
/// may be better ones.
boost::json::object profile_of(const ProfileKey& key, const EngineOptions& options);

}  // namespace flashpack::internal
