#include "torch_binding/format/codec.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "engine/ground/error.h"
#include "engine/ground/system_call.h"
#include "engine/ground/unique_fd.h"
#include "torch_binding/format/foreign_file.h"
#include "torch_binding/format/format_rules.h"

namespace flashpack {

namespace {

using internal::errno_code;
using internal::file_error;

static_assert(std::endian::native == std::endian::little, "payload and lengths are little-endian");

// One read of this size at the end of a file holds the whole footer of a model of some 500 tensors, of which each takes
// a hundred bytes or a little more; one at the beginning holds the header. Longer ones cost a second read.
constexpr std::uint64_t kFirstReadBytes = std::uint64_t{64} << 10;

/// Says what a file is that no codec knows.
[[noreturn]] void refuse_other_file(OpenedFile& file) {
  std::string what = what_it_is(file.head());
  if (file.size_bytes() < rules::kTrailerBytes) {
    rules::refuse(file.path(), "File too small to contain footer: " + std::to_string(file.size_bytes()) + " bytes" +
                                   (what.empty() ? "" : ": " + what));
  }
  const std::string_view magic = std::string_view(file.tail()).substr(file.tail().size() - rules::kMagic.size());
  const bool ends_with_zeros = magic.find_first_not_of('\0') == magic.npos;
  if (what.empty()) {
    what = std::string(
               "it has no flashpack footer at its end, and no safetensors header at its beginning; if it had "
               "one, ") +
           (ends_with_zeros ? "its download was not finished" : rules::kCutFile);
  }
  rules::refuse(file.path(),
                what + " (Bad magic: " + rules::quoted_bytes(magic) + " != " + rules::quoted_bytes(rules::kMagic) + ")",
                file.size_bytes() - magic.size());
}

}  // namespace

OpenedFile::OpenedFile(int fd, const std::filesystem::path& path, std::uint64_t max_json_bytes)
    : path_(path), fd_(fd), max_json_bytes_(max_json_bytes), identity_(identity_now()) {}

FileIdentity OpenedFile::identity_now() const {
  struct stat status{};
  if (::fstat(fd_, &status) != 0) throw file_error(errno_code(errno), "stat", path_);
  if (S_ISDIR(status.st_mode)) throw file_error(errno_code(EISDIR), "read", path_);
  if (!S_ISREG(status.st_mode)) rules::refuse(path_, "it is not a regular file");
  const auto identity = identity_of(fd_);
  if (!identity) throw file_error(errno_code(errno), "stat", path_);
  return *identity;
}

const std::string& OpenedFile::head() {
  if (head_.empty()) head_ = read(0, std::min(size_bytes(), kFirstReadBytes));
  return head_;
}

const std::string& OpenedFile::tail() {
  const std::uint64_t tail_bytes = std::min(size_bytes(), kFirstReadBytes);
  if (tail_.empty()) tail_ = read(size_bytes() - tail_bytes, tail_bytes);
  return tail_;
}

std::string OpenedFile::read(std::uint64_t offset_bytes, std::uint64_t size_bytes) const {
  std::string bytes(size_bytes, '\0');
  const auto copy = [&](std::string_view from, std::uint64_t from_offset_bytes, std::uint64_t begin,
                        std::uint64_t end) {
    from.substr(begin - from_offset_bytes, end - begin).copy(&bytes[begin - offset_bytes], end - begin);
  };
  // The range that is still to be read.
  std::uint64_t begin = offset_bytes;
  std::uint64_t end = offset_bytes + size_bytes;
  if (begin < head_.size()) {
    const std::uint64_t known = std::min<std::uint64_t>(end, head_.size());
    copy(head_, 0, begin, known);
    begin = known;
  }
  const std::uint64_t tail_begin = identity_.size_bytes - tail_.size();
  if (end > std::max(begin, tail_begin)) {
    const std::uint64_t known = std::max(begin, tail_begin);
    copy(tail_, tail_begin, known, end);
    end = known;
  }
  read_to(begin, std::span(bytes).subspan(begin - offset_bytes, end - begin));
  return bytes;
}

void OpenedFile::read_to(std::uint64_t offset_bytes, std::span<char> target) const {
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

void OpenedFile::check_limit(const char* what, std::uint64_t length_bytes, std::uint64_t limit_bytes,
                             std::uint64_t offset_bytes) const {
  limit_bytes = std::min(limit_bytes, max_json_bytes_);
  if (length_bytes <= limit_bytes) return;
  rules::refuse(path_,
                std::string("its ") + what + " of " + std::to_string(length_bytes) + " bytes is over the limit of " +
                    std::to_string(limit_bytes),
                offset_bytes);
}

void OpenedFile::check_unchanged() const {
  if (identity_now() != identity_) throw file_error(Errc::kFileChanged, "read", path_);
}

const Codec& codec_called(std::string_view name) {
  const auto* const codec = std::ranges::find(kCodecs, name, &Codec::name);
  if (codec == kCodecs.end()) throw internal::argument_error("there is no format " + rules::quoted(name));
  return **codec;
}

JsonOfFile read_json(int fd, const std::filesystem::path& path, std::uint64_t max_json_bytes) {
  OpenedFile file(fd, path, max_json_bytes);
  for (const Codec* codec : kCodecs) {
    const std::optional<Codec::Place> place = codec->locate(file);
    if (!place) continue;
    JsonOfFile found{*codec, file.read(place->offset_bytes, place->size_bytes), place->payload_bytes, file.identity()};
    file.check_unchanged();
    return found;
  }
  refuse_other_file(file);
}

std::string_view format_name(FileFormat format) noexcept { return kCodecs[static_cast<std::size_t>(format)]->name; }

Metadata read_metadata(const std::filesystem::path& path, const ReadMetadataOptions& options) {
  return read_metadata(internal::open_file(path).get(), path, options);
}

Metadata read_metadata(int fd, const std::filesystem::path& path, const ReadMetadataOptions& options) {
  const JsonOfFile found = read_json(fd, path, options.max_footer_bytes);
  Metadata metadata = found.codec.parse(found.json, found.payload_bytes, path);
  metadata.identity = found.identity;
  return metadata;
}

std::optional<Metadata> read_metadata(const std::filesystem::path& path, const ReadMetadataOptions& options,
                                      std::error_code& error) noexcept {
  return internal::value_or_code<std::optional<Metadata>>(error, [&] { return read_metadata(path, options); });
}

std::optional<Metadata> read_metadata(int fd, const std::filesystem::path& path, const ReadMetadataOptions& options,
                                      std::error_code& error) noexcept {
  return internal::value_or_code<std::optional<Metadata>>(error, [&] { return read_metadata(fd, path, options); });
}

}  // namespace flashpack
