/// The file that profiles are kept in.
///
/// Thread safety: any thread. A reader finds the profiles of before or after a change. Of two that change the file at
/// the same time one may be lost, unless they hold the lock of keep_profile().
#pragma once

#include <boost/json/array.hpp>
#include <filesystem>
#include <string>
#include <system_error>

namespace flashpack::internal {

/// Why there are none where the path of the file is empty.
inline constexpr const char* kNoProfilesPath = "neither XDG_CONFIG_HOME nor HOME says where profiles are";

struct Profiles {
  boost::json::array all;  ///< Of any type: a person may have edited the file.
  std::string reason;      ///< Why there are none to read; empty if there are.
  std::error_code error;   ///< Of the system; none if the file is missing or damaged.
  bool damaged = false;    ///< Whether the file was read, and is none of profiles.
};

/// Reads the file. Never waits for another process, as a FIFO would.
Profiles profiles_in(const std::filesystem::path& file);

/// Replaces `file`, or what it links to, at once by one with these profiles. Throws: Error.
void replace_profiles(const std::filesystem::path& file, boost::json::array profiles);

}  // namespace flashpack::internal
