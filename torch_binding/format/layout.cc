#include <algorithm>
#include <array>
#include <bit>
#include <boost/locale/utf.hpp>
#include <limits>
#include <unordered_map>
#include <utility>

#include "flashpack/format.h"
#include "torch_binding/format/footer_json.h"
#include "torch_binding/format/format_rules.h"

namespace flashpack {

namespace {

constexpr std::uint64_t kMaxBytes = std::numeric_limits<std::int64_t>::max();  // The footer's integers are int64.

[[noreturn]] void refuse_to_pack(const std::string& sentence) { throw Error(Errc::kInvalidArgument, sentence); }

[[noreturn]] void refuse_tensor(const TensorSpec& tensor, const std::string& cause) {
  refuse_to_pack("pack tensor " + rules::quoted(tensor.name) + ": " + cause);
}

std::uint64_t count_of(const TensorSpec& tensor) {
  const std::optional<std::uint64_t> count = rules::element_count(tensor.shape);
  if (!count) refuse_tensor(tensor, "its shape has a negative dim, more than 64 dims or a size past 2^63");
  return *count;
}

bool is_utf8(std::string_view text) {
  namespace utf = boost::locale::utf;
  for (auto at = text.begin(); at != text.end();) {
    const utf::code_point c = utf::utf_traits<char>::decode(at, text.end());
    if (c == utf::illegal || c == utf::incomplete) return false;
  }
  return true;
}

void check_can_be_written(const Metadata& metadata) {
  if (metadata.format != FileFormat::kFlashPack)
    refuse_to_pack("pack: the metadata is that of a safetensors file, which has no footer");
  for (const auto& [key, value] : metadata.user_metadata) {
    if (!is_utf8(key) || !is_utf8(value))
      refuse_to_pack("pack metadata " + rules::quoted_bytes(key) + ": it is not UTF-8");
  }
}

void check_size(std::uint64_t json_bytes) {
  if (json_bytes > kMaxFooterBytes)
    refuse_to_pack("pack: the footer of " + std::to_string(json_bytes) + " bytes is over the limit of " +
                   std::to_string(kMaxFooterBytes) + ", and could not be read");
}

void check_names(std::span<const TensorSpec> tensors) {
  std::vector<std::string_view> names;
  names.reserve(tensors.size());
  for (const TensorSpec& tensor : tensors) {
    if (!is_utf8(tensor.name))
      refuse_to_pack("pack tensor " + rules::quoted_bytes(tensor.name) + ": its name is not UTF-8");
    names.push_back(tensor.name);
  }
  if (const auto duplicate = rules::find_duplicate(names)) {
    refuse_tensor(tensors[duplicate->second], "its name stands twice");
  }
}

/// These three compute a + b, a * b, and a rounded up to a multiple of b, and throw if the result passes 2^63. `tensor`
/// is for the message.
std::uint64_t add(std::uint64_t a, std::uint64_t b, const TensorSpec& tensor) {
  std::uint64_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum) || sum > kMaxBytes) refuse_tensor(tensor, "the file would pass 2^63 bytes");
  return sum;
}
std::uint64_t multiply(std::uint64_t a, std::uint64_t b, const TensorSpec& tensor) {
  std::uint64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product) || product > kMaxBytes) {
    refuse_tensor(tensor, "the file would pass 2^63 bytes");
  }
  return product;
}
std::uint64_t round_up(std::uint64_t a, std::uint64_t b, const TensorSpec& tensor) {
  const std::uint64_t over = a % b;
  return over == 0 ? a : add(a, b - over, tensor);
}

std::vector<DType> dtypes_in_order(std::span<const TensorSpec> tensors) {
  std::vector<DType> dtypes;
  for (const TensorSpec& tensor : tensors) {
    if (std::find(dtypes.begin(), dtypes.end(), tensor.dtype) == dtypes.end()) dtypes.push_back(tensor.dtype);
  }
  return dtypes;
}

/// Places the tensors of `dtype` in a macroblock at the end of the payload.
void append_macroblock(Metadata& metadata, std::span<const TensorSpec> tensors, DType dtype) {
  Container& container = metadata.container;
  const auto index = static_cast<std::uint32_t>(container.macroblocks.size());
  const std::uint64_t width_bytes = element_bytes(dtype);
  const std::uint64_t align_elems = rules::alignment_elems(container.align_bytes, element_bytes(dtype));
  const auto first = std::find_if(tensors.begin(), tensors.end(), [&](const auto& t) { return t.dtype == dtype; });

  Macroblock macroblock{.dtype = dtype};
  macroblock.offset_bytes = round_up(metadata.payload_bytes, multiply(align_elems, width_bytes, *first), *first);
  for (const TensorSpec& tensor : tensors) {
    if (tensor.dtype != dtype) continue;
    const std::uint64_t offset_elems = round_up(macroblock.length_elems, align_elems, tensor);
    const std::uint64_t length_elems = count_of(tensor);
    macroblock.length_elems = add(offset_elems, length_elems, tensor);
    macroblock.length_bytes = multiply(macroblock.length_elems, width_bytes, tensor);
    metadata.payload_bytes = add(macroblock.offset_bytes, macroblock.length_bytes, tensor);
    metadata.records.push_back({.name = tensor.name,
                                .dtype = dtype,
                                .shape = tensor.shape,
                                .offset_bytes = macroblock.offset_bytes + offset_elems * width_bytes,
                                .size_bytes = length_elems * width_bytes});
    container.macroblock_of.push_back(index);
  }
  container.total_elems += macroblock.length_elems;
  container.macroblocks.push_back(macroblock);
}

}  // namespace

std::vector<std::size_t> file_order(std::span<const TensorSpec> tensors,
                                    std::optional<std::span<const std::string>> name_order) {
  std::vector<std::size_t> order;
  if (!name_order) {
    std::vector<std::uint64_t> counts;
    for (const TensorSpec& tensor : tensors) {
      order.push_back(order.size());
      counts.push_back(count_of(tensor));
    }
    std::sort(order.begin(), order.end(),
              [&](auto a, auto b) { return counts[a] != counts[b] ? counts[a] > counts[b] : a < b; });
    return order;
  }
  constexpr std::size_t kListed = std::numeric_limits<std::size_t>::max();
  std::unordered_map<std::string_view, std::size_t> index_of;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (!index_of.emplace(tensors[i].name, i).second) refuse_tensor(tensors[i], "its name stands twice");
  }
  for (const std::string& name : *name_order) {
    const auto found = index_of.find(name);
    if (found == index_of.end()) continue;
    if (found->second == kListed) refuse_to_pack("name_order lists " + rules::quoted(name) + " twice");
    order.push_back(std::exchange(found->second, kListed));
  }
  return order;
}

Metadata make_layout(std::span<const TensorSpec> tensors, std::uint64_t align_bytes) {
  if (tensors.empty()) refuse_to_pack("No tensors to pack.");
  if (tensors.size() > rules::kMaxRecords) {
    refuse_to_pack(std::to_string(tensors.size()) + " tensors are more than a file can have, " +
                   std::to_string(rules::kMaxRecords));
  }
  if (align_bytes > kMaxBytes) refuse_to_pack("align_bytes must be below 2^63, not " + std::to_string(align_bytes));
  check_names(tensors);
  Metadata metadata;
  metadata.container.align_bytes = align_bytes;
  metadata.records.reserve(tensors.size());
  const std::vector<DType> dtypes = dtypes_in_order(tensors);
  for (const DType dtype : dtypes) append_macroblock(metadata, tensors, dtype);
  metadata.container.version = dtypes.size() == 1 ? 3 : 4;
  return metadata;
}

void check_footer(const Metadata& metadata, bool checksums) {
  check_can_be_written(metadata);
  check_size(footer_json_bytes(metadata, checksums));
}

std::string encode_footer(const Metadata& metadata) {
  check_can_be_written(metadata);
  std::string out = footer_json(metadata, metadata.checksums ? &*metadata.checksums : nullptr);
  check_size(out.size());
  const auto json_bytes = std::bit_cast<std::array<char, sizeof(std::uint64_t)>>(std::uint64_t{out.size()});
  out.append(json_bytes.data(), json_bytes.size());
  out += rules::kMagic;
  return out;
}

}  // namespace flashpack
