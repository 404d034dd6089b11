/// Rules of the container that reading and writing share.
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
inline constexpr std::size_t kMaxRank = 64;
/// Tensors of a file. A reader needs some hundred bytes for each, several times what the JSON of an empty one takes.
inline constexpr std::size_t kMaxRecords = std::size_t{1} << 20;
/// Writers put one for each dtype; even one for each tensor would fit.
inline constexpr std::size_t kMaxMacroblocks = kMaxRecords;

/// Elements of a tensor of that shape. Empty for a negative dim, for more than kMaxRank of them, and when the product
/// passes 2^63 even without the dims that are 0: strides are computed from those.
std::optional<std::uint64_t> element_count(std::span<const std::int64_t> shape) noexcept;

/// Tensors start at multiples of this many elements from the start of their macroblock; 1 when dense.
std::uint64_t alignment_elems(std::uint64_t align_bytes, std::uint32_t element_bytes) noexcept;

struct DuplicateName {
  std::size_t first;
  std::size_t second;
};
/// Two equal names, by index. n log n whatever the names are: a hash table could be driven to n^2 by a hostile file.
std::optional<DuplicateName> find_duplicate(std::span<const std::string_view> names);

/// Appends `utf8` as a JSON string, escaped exactly as the format has it: only what JSON demands, hex in lower case.
void append_json_string(std::string& out, std::string_view utf8);

/// For messages: a name as a JSON string, cut when long.
std::string quoted(std::string_view utf8);
/// The same for bytes that may not be text: what is not printable ASCII as \xHH.
std::string quoted_bytes(std::string_view bytes);

inline constexpr std::string_view kFooterCrcKey = ",\"footer_crc32c\":\"";
inline constexpr std::size_t kCrcDigits = 8;
/// In hexadecimal, kCrcDigits of them, in lower case.
void append_crc(std::string& out, std::uint32_t crc32c);
/// The other way, in either case; empty for anything else.
std::optional<std::uint32_t> parse_crc(std::string_view digits) noexcept;

/// Throws Error (kBadFile): "read PATH at OFFSET: SENTENCE: not a valid flashpack file".
[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& sentence,
                         std::uint64_t offset_bytes = Error::kNoOffset);

}  // namespace flashpack::rules
