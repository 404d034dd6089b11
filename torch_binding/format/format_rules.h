/// Rules of the formats that reading and writing share: what a tensor may be, how values are written, and how names are
/// quoted and files refused in messages.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "flashpack/error.h"

namespace flashpack::rules {

inline constexpr std::string_view kMagic{"FLASHPK\0", 8};
/// The footer's length as a little-endian u64, then the magic.
inline constexpr std::uint64_t kTrailerBytes = sizeof(std::uint64_t) + kMagic.size();
/// A safetensors file begins with its header's length as a little-endian u64.
inline constexpr std::uint64_t kHeaderLengthBytes = sizeof(std::uint64_t);
/// The length that stands at `at`.
std::uint64_t length_at(std::string_view bytes, std::size_t at);
inline constexpr std::size_t kMaxRank = 64;
/// A limit, because a reader needs several times as much memory for a record as the JSON of an empty tensor takes.
inline constexpr std::size_t kMaxRecords = std::size_t{1} << 20;
/// Writers need one macroblock for each dtype; this limit allows one for each tensor.
inline constexpr std::size_t kMaxMacroblocks = kMaxRecords;

/// Elements of a tensor of that shape. Empty for a negative dim, for more than kMaxRank dims, and if the product of the
/// dims that are not 0 passes 2^63, because strides are computed from that product.
std::optional<std::uint64_t> element_count(std::span<const std::int64_t> shape) noexcept;

/// Tensors start at multiples of this many elements from the start of their macroblock. It is 1 if `align_bytes` is 0.
std::uint64_t alignment_elems(std::uint64_t align_bytes, std::uint32_t element_bytes) noexcept;

struct DuplicateName {
  std::size_t first;
  std::size_t second;
};
/// Returns the indices of two equal names. It takes n log n steps for any names, whereas a hostile file could drive a
/// hash table to n^2.
std::optional<DuplicateName> find_duplicate(std::span<const std::string_view> names);

/// Appends `utf8` as a JSON string, escaped as the Python reference does it: only what JSON demands, with hexadecimal
/// digits in lower case.
void append_json_string(std::string& out, std::string_view utf8);

/// A name as a JSON string for messages, cut when long.
std::string quoted(std::string_view utf8);
/// The same for bytes that may not be text: bytes that are not printable ASCII become \xHH.
std::string quoted_bytes(std::string_view bytes);

inline constexpr std::string_view kFooterCrcKey = ",\"footer_crc32c\":\"";
inline constexpr std::size_t kCrcDigits = 8;
/// Appends kCrcDigits hexadecimal digits in lower case.
void append_crc(std::string& out, std::uint32_t crc32c);
/// Parses such digits in lower or upper case; empty for anything else.
std::optional<std::uint32_t> parse_crc(std::string_view digits) noexcept;

/// Says why a file may end before its tensors do, and what to do.
inline constexpr const char* kCutFile = "it was cut, and has to be downloaded or copied again";

/// Throws Error (kBadFile): "open PATH: SENTENCE: not a valid checkpoint".
[[noreturn]] void refuse_to_open(const std::filesystem::path& path, const std::string& sentence);
/// Throws Error (kBadFile): "read PATH at OFFSET: SENTENCE: not a valid checkpoint".
[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& sentence,
                         std::uint64_t offset_bytes = Error::kNoOffset);

}  // namespace flashpack::rules
