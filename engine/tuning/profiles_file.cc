#include "engine/tuning/profiles_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <boost/json/object.hpp>
#include <boost/json/parse.hpp>
#include <boost/json/serialize.hpp>
#include <cstdint>
#include <utility>

#include "engine/ground/error.h"
#include "engine/ground/unique_fd.h"

namespace flashpack::internal {

namespace {

namespace fs = std::filesystem;
namespace json = boost::json;

// Far more than a person's profiles take. A larger file is not one of ours.
constexpr std::uint64_t kMaxFileBytes = std::uint64_t{1} << 20;

// The text of a file, cut after kMaxFileBytes + 1.
std::string text_in(const fs::path& file, std::error_code& error) {
  // A FIFO would make a plain open wait for a writer.
  const UniqueFd fd(::open(file.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
  std::string text(kMaxFileBytes + 1, '\0');
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
  if (text.size() <= kMaxFileBytes) document = json::parse(text, damage);
  json::value* const found = document.is_object() ? document.get_object().if_contains("profiles") : nullptr;
  profiles.reason = file.string() + " is damaged" + (damage ? ": " + damage.message() : "");
  if (found == nullptr || !found->is_array()) return profiles;
  return {std::move(found->get_array()), {}, {}};
}

void replace_profiles(const fs::path& file, json::array profiles) {
  const std::string text = json::serialize(json::object{{"profiles", std::move(profiles)}}) + "\n";
  std::error_code error;
  const bool exists = fs::exists(file, error);
  const fs::path target = exists ? fs::canonical(file, error) : file;
  if (exists && error) throw file_error(error, "resolve the links of", file);
  std::string name = target.string() + ".XXXXXX";
  UniqueFd fd(::mkostemp(name.data(), O_CLOEXEC));
  if (!fd) throw file_error(errno_code(errno), "create", name);
  const ssize_t written = ::write(fd.get(), text.data(), text.size());
  const bool whole = written == static_cast<ssize_t>(text.size());
  if (!whole || ::fsync(fd.get()) != 0 || ::rename(name.c_str(), target.c_str()) != 0) {
    const int error_number = whole || written < 0 ? errno : ENOSPC;
    ::unlink(name.c_str());
    throw file_error(errno_code(error_number), "write", target);
  }
}

}  // namespace flashpack::internal
