/// The JSON of a footer, parsed into typed fields and written.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "flashpack/format.h"

namespace flashpack {

/// A record as the footer has it, in elements of its macroblock.
struct RecordFields {
  std::string name;
  std::vector<std::int64_t> shape;
  std::uint64_t offset_elems = 0;  ///< From the start of the macroblock.
  std::uint64_t length_elems = 0;
  std::uint32_t macroblock = 0;
};

/// The fields of a footer. Types, signs, required keys of macroblocks and records, and uniqueness of keys have been
/// checked; whether the values agree with each other and with the file has not.
struct FooterFields {
  std::optional<std::string> format;
  std::optional<std::string> target_dtype;
  std::optional<std::uint64_t> align_bytes;
  std::optional<std::uint64_t> total_elems;
  std::optional<std::uint64_t> total_payload_bytes;
  std::optional<std::vector<Macroblock>> macroblocks;
  std::optional<std::vector<RecordFields>> records;
  std::optional<std::string> crc32c_per_mib;
  std::optional<std::string> footer_crc32c;
  std::map<std::string, std::string> user_metadata;
};

/// Integers must fit int64 and not be negative. A key that is not known is checked as JSON and skipped, except in a
/// macroblock, where it is refused because it may say that the bytes are encoded. `payload_bytes` turns an offset in
/// the text into one in the file, for messages. Throws: Error (kBadFile).
FooterFields parse_footer_json(std::string_view json, std::uint64_t payload_bytes, const std::filesystem::path& path);

/// Returns the footer of a file that `metadata` describes, with `checksums` if given. All of its text is UTF-8.
std::string footer_json(const Metadata& metadata, const Checksums* checksums);
/// Returns how long that is, in bytes, and takes no memory for it.
std::uint64_t footer_json_bytes(const Metadata& metadata, bool checksums);

}  // namespace flashpack
