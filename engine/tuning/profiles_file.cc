#include "engine/tuning/profiles_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <boost/json/object.hpp>
#include <boost/json/parse.hpp>
#include <boost/json/serialize.hpp>
#include <cstdint>
#include <utility>

#include "engine/ground/error.h"
#include "engine/ground/system_call.h"
#include "engine/ground/unique_fd.h"
#include "engine/temp_file.h"

namespace flashpack::internal {

namespace {

namespace fs = std::filesystem;
namespace json = boost::json;

// Far more than a person's profiles take. A larger file is not one of ours.
constexpr std::uint64_t kMaxProfilesBytes = std::uint64_t{1} << 20;

// The text of a file, cut after kMaxProfilesBytes + 1.
std::string text_in(const fs::path& file, std::error_code& error) {
  // A FIFO would make a plain open wait for a writer.
  const UniqueFd fd(::open(file.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
  std::string text(kMaxProfilesBytes + 1, '\0');
  std::size_t size = 0;
  ssize_t got = fd ? 1 : -1;
  while (got > 0 && size < text.size()) {
    got = uninterrupted([&] { return ::read(fd.get(), text.data() + size, text.size() - size); });
    if (got > 0) size += static_cast<std::size_t>(got);
  }
  if (got < 0) error = errno_code(errno);
  text.resize(size);
  return text;
}

}  // namespace

Profiles profiles_in(const fs::path& file) {
  Profiles profiles;
  const std::string text = text_in(file, profiles.error);
  if (profiles.error == std::errc::no_such_file_or_directory) return {{}, "there is no " + file.string(), {}};
  profiles.reason = file.string() + " cannot be read: " + profiles.error.message();
  if (profiles.error) return profiles;
  json::error_code damage;
  json::value document;
  if (text.size() <= kMaxProfilesBytes) document = json::parse(text, damage);
  json::value* const found = document.is_object() ? document.get_object().if_contains("profiles") : nullptr;
  profiles.reason = file.string() + " is damaged" + (damage ? ": " + damage.message() : "");
  profiles.damaged = found == nullptr || !found->is_array();
  if (profiles.damaged) return profiles;
  return {std::move(found->get_array()), {}, {}};
}

void replace_profiles(const fs::path& file, json::array profiles) {
  replace_file(file, json::serialize(json::object{{"profiles", std::move(profiles)}}) + "\n");
}

}  // namespace flashpack::internal
