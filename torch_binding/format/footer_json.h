/// A footer's JSON as typed fields.
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

/// A record as the footer has it: a number of elements in one macroblock.
struct RecordFields {
  std::string name;
  std::vector<std::int64_t> shape;
  std::uint64_t offset_elems = 0;  ///< From the start of its macroblock.
  std::uint64_t length_elems = 0;
  std::uint32_t macroblock = 0;
};

/// What a footer says. Types, signs, required keys of macroblocks and records, and uniqueness of keys are checked;
/// whether the values agree with each other and with the file is not.
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

/// Integers fit int64 and are not negative. Keys that are not known are checked as JSON and passed over, except in
/// macroblocks, where they may say that the bytes are encoded. `payload_bytes` turns a place in the text into an offset
/// in the file. Throws: Error (kBadFile).
FooterFields parse_footer_json(std::string_view json, std::uint64_t payload_bytes, const std::filesystem::path& path);

}  // namespace flashpack
