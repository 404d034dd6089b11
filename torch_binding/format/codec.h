/// The formats of checkpoint files. The source of a format defines its Codec, and kCodecs lists them.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "flashpack/format.h"

namespace flashpack {

/// A regular file that is open for reading. head(), tail() and read() give its bytes, the check functions refuse it,
/// and the other functions ask. Throws: Error (errno; kBadFile; kTruncated). Thread safety: one thread.
class OpenedFile {
 public:
  /// Borrows both. `max_json_bytes`: see check_limit().
  OpenedFile(int fd, const std::filesystem::path& path, std::uint64_t max_json_bytes);

  const std::filesystem::path& path() const noexcept { return path_; }
  /// The identity that the file had when this was made.
  const FileIdentity& identity() const noexcept { return identity_; }
  std::uint64_t size_bytes() const noexcept { return identity_.size_bytes; }

  /// The first and the last bytes, 64 KiB or, if the file is smaller, all. They are read when they are first wanted.
  const std::string& head();
  const std::string& tail();
  /// Returns the bytes of a range; what head() and tail() have is not read again. Requires: the range is in the file.
  std::string read(std::uint64_t offset_bytes, std::uint64_t size_bytes) const;

  /// Throws Error (kBadFile) if the JSON, called `what`, is longer than `limit_bytes` or than this file's own limit.
  /// `offset_bytes`: where the file has the length, if it has it.
  void check_limit(const char* what, std::uint64_t length_bytes, std::uint64_t limit_bytes,
                   std::uint64_t offset_bytes = Error::kNoOffset) const;
  /// Throws Error (kFileChanged) if the identity is another one by now.
  void check_unchanged() const;

 private:
  FileIdentity identity_now() const;
  void read_to(std::uint64_t offset_bytes, std::span<char> target) const;

  const std::filesystem::path& path_;
  const int fd_;
  const std::uint64_t max_json_bytes_;
  const FileIdentity identity_;
  std::string head_;
  std::string tail_;
};

/// The functions of one format.
struct Codec {
  /// Where a file has its JSON, and where its payload ends.
  struct Place {
    std::uint64_t offset_bytes = 0;
    std::uint64_t size_bytes = 0;
    std::uint64_t payload_bytes = 0;
  };

  FileFormat format;
  std::string_view name;
  /// Empty for a file of another format. Throws: Error (kBadFile) for a place that no file has; what reading throws.
  std::optional<Place> (*locate)(OpenedFile& file);
  /// Checks JSON against the end of the payload. `path` is for messages. Throws: Error (kBadFile).
  Metadata (*parse)(std::string_view json, std::uint64_t payload_bytes, const std::filesystem::path& path);
};

extern const Codec kFlashPackCodec;
extern const Codec kSafetensorsCodec;
/// Indexed by FileFormat. A file is of the first format that recognises it.
inline constexpr std::array kCodecs = {&kFlashPackCodec, &kSafetensorsCodec};

/// Throws: Error (kInvalidArgument) for an unknown name.
const Codec& codec_called(std::string_view name);

/// The JSON of a file, which its codec parses.
struct JsonOfFile {
  const Codec& codec;
  std::string json;
  std::uint64_t payload_bytes;
  FileIdentity identity;
};

/// Reads the JSON of the file that is open as `fd`, which is borrowed. Throws: Error (kBadFile if no codec knows the
/// file, which says what else it looks like; errno; kTruncated; kFileChanged).
JsonOfFile read_json(int fd, const std::filesystem::path& path, std::uint64_t max_json_bytes);

}  // namespace flashpack
