#include "flashpack/format.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "engine/ground/error.h"
#include "engine/ground/unique_fd.h"
#include "torch_binding/format/foreign_file.h"
#include "torch_binding/format/format_rules.h"

namespace flashpack {

namespace {

using internal::errno_code;
using internal::file_error;

static_assert(std::endian::native == std::endian::little, "payload and trailer are little-endian");

// One read of this size at the end of a file holds the whole footer of most models, one at the beginning the header.
constexpr std::uint64_t kFirstReadBytes = std::uint64_t{64} << 10;

// As a header's length, the first bytes of a text would be larger than this.
constexpr std::uint64_t kNoHeaderBytes = std::uint64_t{1} << 48;

/// Reads from an open file, which is borrowed. Throws: Error (errno; kTruncated; kFileChanged).
class OpenedFile {
 public:
  OpenedFile(int fd, const std::filesystem::path& path) : path_(path), fd_(fd) {}

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

/// Reads the JSON of one file. Every member throws Error (kBadFile) for what is not a checkpoint.
class JsonOfFile {
 public:
  JsonOfFile(const OpenedFile& file, std::uint64_t size_bytes, std::uint64_t max_bytes,
             const std::filesystem::path& path)
      : file_(file), size_bytes_(size_bytes), max_bytes_(max_bytes), path_(path) {}

  std::pair<FileFormat, std::string> read() const {
    std::string tail(std::min(size_bytes_, kFirstReadBytes), '\0');
    file_.read(size_bytes_ - tail.size(), tail);
    if (tail.ends_with(rules::kMagic)) return {FileFormat::kFlashPack, footer(tail)};
    std::string head = tail;
    if (head.size() < size_bytes_) file_.read(0, head);
    if (!begins_with_header(head)) refuse_other_file(head, tail);
    return {FileFormat::kSafetensors, header(head)};
  }

 private:
  std::string footer(const std::string& tail) const {
    if (size_bytes_ < rules::kTrailerBytes) refuse_small_file(tail);
    const std::size_t have_bytes = tail.size() - rules::kTrailerBytes;
    const std::uint64_t length_bytes = length_at(tail, have_bytes);
    const std::uint64_t end = size_bytes_ - rules::kTrailerBytes;
    if (length_bytes > end) {
      rules::refuse(path_,
                    "Corrupt footer length: " + std::to_string(length_bytes) + " bytes in a file of " +
                        std::to_string(size_bytes_),
                    end);
    }
    check_limit("footer", length_bytes, max_bytes_, end);
    if (length_bytes <= have_bytes) return tail.substr(have_bytes - length_bytes, length_bytes);
    std::string json(length_bytes, '\0');
    file_.read(end - length_bytes, std::span(json).first(length_bytes - have_bytes));
    std::copy_n(tail.begin(), have_bytes, json.end() - static_cast<std::ptrdiff_t>(have_bytes));
    return json;
  }

  std::string header(const std::string& head) const {
    const std::uint64_t length_bytes = length_at(head, 0);
    check_limit("safetensors header", length_bytes, std::min(max_bytes_, kMaxSafetensorsHeaderBytes), 0);
    if (length_bytes > size_bytes_ - rules::kHeaderLengthBytes) {
      rules::refuse(path_, "its safetensors header of " + std::to_string(length_bytes) +
                               " bytes goes past the end of the file: " + rules::kCutFile);
    }
    std::string json = head.substr(rules::kHeaderLengthBytes, length_bytes);
    const std::size_t have_bytes = json.size();
    json.resize(length_bytes);
    file_.read(rules::kHeaderLengthBytes + have_bytes, std::span(json).subspan(have_bytes));
    return json;
  }

  /// Whether `head` may be the beginning of a safetensors file. Some writers put spaces before the JSON.
  static bool begins_with_header(const std::string& head) {
    const std::size_t first = head.find_first_not_of(" \t\r\n", rules::kHeaderLengthBytes);
    return first != head.npos && head[first] == '{' && length_at(head, 0) < kNoHeaderBytes;
  }

  static std::uint64_t length_at(const std::string& bytes, std::size_t at) {
    std::uint64_t length_bytes = 0;
    std::memcpy(&length_bytes, &bytes.at(at), sizeof length_bytes);
    return length_bytes;
  }

  void check_limit(const std::string& what, std::uint64_t length_bytes, std::uint64_t limit_bytes,
                   std::uint64_t offset_bytes) const {
    if (length_bytes <= limit_bytes) return;
    rules::refuse(path_,
                  "its " + what + " of " + std::to_string(length_bytes) + " bytes is over the limit of " +
                      std::to_string(limit_bytes),
                  offset_bytes);
  }

  [[noreturn]] void refuse_small_file(std::string_view head) const {
    const std::string what = what_it_is(head);
    rules::refuse(path_, "File too small to contain footer: " + std::to_string(size_bytes_) + " bytes" +
                             (what.empty() ? "" : ": " + what));
  }

  [[noreturn]] void refuse_other_file(const std::string& head, const std::string& tail) const {
    if (size_bytes_ < rules::kTrailerBytes) refuse_small_file(head);
    const std::string_view magic = std::string_view(tail).substr(tail.size() - rules::kMagic.size());
    const bool ends_with_zeros = magic.find_first_not_of('\0') == magic.npos;
    std::string what = what_it_is(head);
    if (what.empty()) {
      what = std::string(
                 "it has no flashpack footer at its end, and no safetensors header at its beginning; if it had "
                 "one, ") +
             (ends_with_zeros ? "its download was not finished" : rules::kCutFile);
    }
    rules::refuse(
        path_, what + " (Bad magic: " + rules::quoted_bytes(magic) + " != " + rules::quoted_bytes(rules::kMagic) + ")",
        size_bytes_ - magic.size());
  }

  const OpenedFile& file_;
  const std::uint64_t size_bytes_;
  const std::uint64_t max_bytes_;
  const std::filesystem::path& path_;
};

}  // namespace

std::string_view format_name(FileFormat format) noexcept {
  return format == FileFormat::kFlashPack ? "flashpack" : "safetensors";
}

Metadata read_metadata(const std::filesystem::path& path, const ReadMetadataOptions& options) {
  return read_metadata(internal::open_file(path).get(), path, options);
}

Metadata read_metadata(int fd, const std::filesystem::path& path, const ReadMetadataOptions& options) {
  const OpenedFile file(fd, path);
  const FileIdentity identity = file.identity();
  const std::uint64_t size_bytes = identity.size_bytes;
  const auto [format, json] = JsonOfFile(file, size_bytes, options.max_footer_bytes, path).read();
  file.check_unchanged(identity);

  Metadata metadata = format == FileFormat::kSafetensors
                          ? parse_safetensors_header(json, size_bytes, path)
                          : parse_footer(json, size_bytes - rules::kTrailerBytes - json.size(), path);
  metadata.identity = identity;
  return metadata;
}

}  // namespace flashpack
