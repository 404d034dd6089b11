#include "flashpack/format.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "engine/ground/error.h"
#include "engine/ground/unique_fd.h"
#include "torch_binding/format/format_rules.h"

namespace flashpack {

namespace {

using internal::errno_code;
using internal::file_error;

static_assert(std::endian::native == std::endian::little, "payload and trailer are little-endian");

// One read of this size holds the whole footer of most models.
constexpr std::uint64_t kTailBytes = std::uint64_t{64} << 10;

/// Reads the footer's bytes of an open file, which is borrowed. Throws: Error (errno; kTruncated; kFileChanged).
class FooterFile {
 public:
  FooterFile(int fd, const std::filesystem::path& path) : path_(path), fd_(fd) {}

  FileIdentity identity() const {
    struct stat status{};
    if (::fstat(fd_, &status) != 0) throw file_error(errno_code(errno), "stat", path_);
    if (S_ISDIR(status.st_mode)) throw file_error(errno_code(EISDIR), "read", path_);
    if (!S_ISREG(status.st_mode)) rules::refuse(path_, "it is not a regular file");
    const auto identity = identity_of(fd_);
    if (!identity) throw file_error(errno_code(errno), "stat", path_);
    return *identity;
  }

  void read(std::uint64_t offset_bytes, std::span<char> target) const {
    while (!target.empty()) {
      const ssize_t got = internal::uninterrupted(
          [&] { return ::pread(fd_, target.data(), target.size(), static_cast<off_t>(offset_bytes)); });
      if (got <= 0) {
        const std::error_code code = got < 0 ? errno_code(errno) : Errc::kTruncated;
        throw internal::range_error(code, "read", path_, offset_bytes, target.size());
      }
      offset_bytes += static_cast<std::uint64_t>(got);
      target = target.subspan(static_cast<std::size_t>(got));
    }
  }

  void check_unchanged(const FileIdentity& before) const {
    if (identity() != before) throw file_error(Errc::kFileChanged, "read", path_);
  }

 private:
  const std::filesystem::path& path_;
  int fd_;
};

/// Returns the length of the footer, from the last kTrailerBytes of a file. Throws: Error (kBadFile).
std::uint64_t footer_bytes(std::string_view trailer, std::uint64_t size_bytes, const ReadMetadataOptions& options,
                           const std::filesystem::path& path) {
  const std::string_view magic = trailer.substr(sizeof(std::uint64_t));
  if (magic != rules::kMagic) {
    rules::refuse(path, "Bad magic: " + rules::quoted_bytes(magic) + " != " + rules::quoted_bytes(rules::kMagic),
                  size_bytes - rules::kMagic.size());
  }
  std::uint64_t length_bytes = 0;
  std::memcpy(&length_bytes, trailer.data(), sizeof length_bytes);
  if (length_bytes > size_bytes - rules::kTrailerBytes) {
    rules::refuse(
        path,
        "Corrupt footer length: " + std::to_string(length_bytes) + " bytes in a file of " + std::to_string(size_bytes),
        size_bytes - rules::kTrailerBytes);
  }
  if (length_bytes > options.max_footer_bytes) {
    rules::refuse(path,
                  "its footer of " + std::to_string(length_bytes) + " bytes is over the limit of " +
                      std::to_string(options.max_footer_bytes),
                  size_bytes - rules::kTrailerBytes);
  }
  return length_bytes;
}

}  // namespace

Metadata read_metadata(const std::filesystem::path& path, const ReadMetadataOptions& options) {
  return read_metadata(internal::open_file(path).get(), path, options);
}

Metadata read_metadata(int fd, const std::filesystem::path& path, const ReadMetadataOptions& options) {
  const FooterFile file(fd, path);
  const FileIdentity identity = file.identity();
  const std::uint64_t size_bytes = identity.size_bytes;
  if (size_bytes < rules::kTrailerBytes) {
    rules::refuse(path, "File too small to contain footer: " + std::to_string(size_bytes) + " bytes");
  }
  std::string tail(std::min(size_bytes, kTailBytes), '\0');
  file.read(size_bytes - tail.size(), tail);
  const std::uint64_t json_bytes =
      footer_bytes(std::string_view(tail).substr(tail.size() - rules::kTrailerBytes), size_bytes, options, path);
  const std::uint64_t payload_bytes = size_bytes - rules::kTrailerBytes - json_bytes;

  tail.resize(tail.size() - rules::kTrailerBytes);
  std::string long_footer;
  std::string_view json = tail;
  if (json_bytes > tail.size()) {
    long_footer.resize(json_bytes);
    file.read(payload_bytes, std::span(long_footer).first(json_bytes - tail.size()));
    std::copy(tail.begin(), tail.end(), long_footer.end() - static_cast<std::ptrdiff_t>(tail.size()));
    json = long_footer;
  } else {
    json.remove_prefix(tail.size() - json_bytes);
  }
  file.check_unchanged(identity);

  Metadata metadata = parse_footer(json, payload_bytes, path);
  metadata.identity = identity;
  return metadata;
}

}  // namespace flashpack
