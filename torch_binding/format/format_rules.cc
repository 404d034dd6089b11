#include "torch_binding/format/format_rules.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <functional>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

namespace flashpack::rules {

std::uint64_t length_at(std::string_view bytes, std::size_t at) {
  std::uint64_t length_bytes = 0;
  bytes.substr(at).copy(reinterpret_cast<char*>(&length_bytes), sizeof length_bytes);
  return length_bytes;
}

std::optional<std::uint64_t> element_count(std::span<const std::int64_t> shape) noexcept {
  if (shape.size() > kMaxRank) return std::nullopt;
  std::int64_t product = 1;
  bool empty = false;
  for (const std::int64_t dim : shape) {
    if (dim < 0) return std::nullopt;
    if (dim == 0) {
      empty = true;
    } else if (__builtin_mul_overflow(product, dim, &product)) {
      return std::nullopt;
    }
  }
  return empty ? 0 : static_cast<std::uint64_t>(product);
}

std::uint64_t alignment_elems(std::uint64_t align_bytes, std::uint32_t element_bytes) noexcept {
  if (align_bytes == 0) return 1;
  return align_bytes / std::gcd(align_bytes, std::uint64_t{element_bytes});
}

namespace {

std::optional<DuplicateName> find_duplicate_of_few(std::span<const std::string_view> names) {
  for (std::size_t i = 1; i < names.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (names[i] == names[j]) return DuplicateName{j, i};
    }
  }
  return std::nullopt;
}

}  // namespace

std::optional<DuplicateName> find_duplicate(std::span<const std::string_view> names) {
  constexpr std::size_t kFew = 16;  // A bound for what is compared in pairs, and not tuned.
  if (names.size() <= kFew) return find_duplicate_of_few(names);
  struct Entry {
    std::size_t hash;
    std::size_t index;
  };
  std::vector<Entry> entries;
  entries.reserve(names.size());
  for (std::size_t i = 0; i < names.size(); ++i) entries.push_back({std::hash<std::string_view>{}(names[i]), i});
  std::sort(entries.begin(), entries.end(), [&](const Entry& a, const Entry& b) {
    if (a.hash != b.hash) return a.hash < b.hash;
    const int order = names[a.index].compare(names[b.index]);
    return order != 0 ? order < 0 : a.index < b.index;
  });
  const auto same = std::adjacent_find(entries.begin(), entries.end(), [&](const Entry& a, const Entry& b) {
    return a.hash == b.hash && names[a.index] == names[b.index];
  });
  if (same == entries.end()) return std::nullopt;
  return DuplicateName{same->index, std::next(same)->index};
}

namespace {

constexpr std::string_view kHex = "0123456789abcdef";
constexpr std::size_t kMaxQuotedBytes = 120;

}  // namespace

void append_json_string(std::string& out, std::string_view utf8) {
  out += '"';
  for (const char c : utf8) {
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\b':
        out += "\\b";
        break;
      case '\f':
        out += "\\f";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      default:
        if (const auto byte = static_cast<unsigned char>(c); byte < 0x20) {
          out.append({'\\', 'u', '0', '0', kHex[byte >> 4], kHex[byte & 0xf]});
        } else {
          out += c;
        }
    }
  }
  out += '"';
}

std::string quoted(std::string_view utf8) {
  std::string out;
  if (utf8.size() <= kMaxQuotedBytes) {
    append_json_string(out, utf8);
    return out;
  }
  std::size_t end = kMaxQuotedBytes;
  while (end > 0 && (static_cast<unsigned char>(utf8[end]) & 0xc0) == 0x80) --end;  // Does not cut a character.
  append_json_string(out, utf8.substr(0, end));
  return out + "...";
}

std::string quoted_bytes(std::string_view bytes) {
  std::string out = "\"";
  for (const char c : bytes.substr(0, kMaxQuotedBytes)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 0xf]};
    }
  }
  return out + (bytes.size() > kMaxQuotedBytes ? "\"..." : "\"");
}

void refuse(const std::filesystem::path& path, const std::string& sentence, std::uint64_t offset_bytes) {
  std::string context = "read " + (path.empty() ? std::string("footer") : path.string());
  if (offset_bytes != Error::kNoOffset) context += " at " + std::to_string(offset_bytes);
  throw Error(Errc::kBadFile, context + ": " + sentence, path, offset_bytes);
}

void refuse_to_open(const std::filesystem::path& path, const std::string& sentence) {
  throw Error(Errc::kBadFile, "open " + path.string() + ": " + sentence, path);
}

void append_crc(std::string& out, std::uint32_t crc32c) {
  std::array<char, kCrcDigits + 1> digits{};
  std::snprintf(digits.data(), digits.size(), "%08x", crc32c);
  out += digits.data();
}

std::optional<std::uint32_t> parse_crc(std::string_view digits) noexcept {
  std::uint32_t crc = 0;
  const auto [end, error] = std::from_chars(digits.begin(), digits.end(), crc, 16);
  if (digits.size() != kCrcDigits || error != std::errc() || end != digits.end()) return std::nullopt;
  return crc;
}

}  // namespace flashpack::rules
