/// One profile of the file: which loads it is for, and the options that it has for them. A profile is a JSON value that
/// a person may have edited, so that each question has an answer for a value of any type and with any members.
///
/// profile_of() writes a profile, and take_values() reads one. is_for(), is_for_storage_of(), is_stale_for(),
/// is_for_gpu() and text_of_difference() are about the loads that it is for, and the other functions about its options.
///
/// Sizes are in bytes, and the texts are for people. Throws: nothing but std::bad_alloc.
///
/// Thread safety: any thread may call any function; the objects are standard containers, and are only borrowed for the
/// call.
#pragma once

#include <boost/json/object.hpp>
#include <boost/json/value.hpp>
#include <string>

#include "engine/tuning/profile_key.h"
#include "flashpack/engine.h"

namespace flashpack::internal {

/// Whether the profile is for the loads that have this key: it has all values of the key. Such a profile is an object.
bool is_for(const boost::json::value& profile, const ProfileKey& key);

/// Whether the profile is for the disk or the server of the key, though perhaps for another kernel or GPU. Such a
/// profile is an object.
bool is_for_storage_of(const boost::json::value& profile, const ProfileKey& key);

/// Whether the profile would be for the loads that have this key, were it not for the kernel or the model of GPU. Such
/// a profile is an object.
bool is_stale_for(const boost::json::value& profile, const ProfileKey& key);

/// Whether the profile is for loads to a GPU.
bool is_for_gpu(const boost::json::value& profile);

/// The first value of the key that the profile does not have: `for kernel "6.1", and here it is "6.18"`. Empty if
/// is_for().
std::string text_of_difference(const boost::json::value& profile, const ProfileKey& key);

/// Whether a profile may have these options: values that an engine takes, at most 1 GiB of staging memory, and as
/// backend the engine's choice or the workers, which any system allows. Where io_uring is refused, an engine that is
/// told to use it throws, so that no profile forces it.
bool is_in_range(const EngineOptions& options);

/// Whether the profile says that nothing was better than the defaults, whatever they are. It has no values then.
bool has_defaults(const boost::json::object& profile);

/// Puts chunk_bytes, queue_depth, workers, staging_bytes and backend of the profile in place of those of `options`,
/// whose device, which must be set, decides what staging memory is usual. Returns false, and changes nothing, if one is
/// missing or not is_in_range().
bool take_values(const boost::json::object& profile, EngineOptions& options);

/// The options that a profile can have, such as "4 MiB x 8, 3 workers": the chunk size and the queue depth, and what
/// else is not left to the engine.
std::string text_of(const EngineOptions& options);

/// The profile that has these options for `key`. The defaults are not written down, because those of a later version
/// may be better ones; see has_defaults(). Requires: is_in_range(options); the key is known.
boost::json::object profile_of(const ProfileKey& key, const EngineOptions& options);

}  // namespace flashpack::internal
