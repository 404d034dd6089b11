#include "torch_binding/format/safetensors_header.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <utility>

#include "torch_binding/format/codec.h"
#include "torch_binding/format/format_rules.h"
#include "torch_binding/format/json_writer.h"
#include "torch_binding/format/record_reader.h"

namespace flashpack {

namespace {

// In the order in which safetensors 0.8 writes tensors. Each dtype begins at a multiple of its size, because larger
// ones come first.
constexpr std::array<std::pair<std::string_view, DType>, 20> kDTypes = {{{"U64", DType::kUInt64},
                                                                         {"I64", DType::kInt64},
                                                                         {"F64", DType::kFloat64},
                                                                         {"C64", DType::kComplex64},
                                                                         {"F32", DType::kFloat32},
                                                                         {"U32", DType::kUInt32},
                                                                         {"I32", DType::kInt32},
                                                                         {"BF16", DType::kBFloat16},
                                                                         {"F16", DType::kFloat16},
                                                                         {"U16", DType::kUInt16},
                                                                         {"I16", DType::kInt16},
                                                                         {"F8_E5M2FNUZ", DType::kFloat8E5M2FNUZ},
                                                                         {"F8_E4M3FNUZ", DType::kFloat8E4M3FNUZ},
                                                                         {"F8_E8M0", DType::kFloat8E8M0FNU},
                                                                         {"F8_E4M3", DType::kFloat8E4M3FN},
                                                                         {"F8_E5M2", DType::kFloat8E5M2},
                                                                         {"I8", DType::kInt8},
                                                                         {"U8", DType::kUInt8},
                                                                         {"F4", DType::kFloat4E2M1FNX2},
                                                                         {"BOOL", DType::kBool}}};

constexpr std::string_view kUserMetadata = "__metadata__";
// Readers map the file, so that its tensors have to be aligned.
constexpr std::uint64_t kPayloadAlignBytes = 8;
// As a header's length, the first bytes of a text would be larger than this.
constexpr std::uint64_t kNoHeaderBytes = std::uint64_t{1} << 48;

const auto* find_dtype(DType dtype) {
  return std::ranges::find(kDTypes, dtype, &std::pair<std::string_view, DType>::second);
}

bool has_nul(std::string_view text) { return text.find('\0') != text.npos; }

/// Reads one header.
class HeaderReader final : RecordReader {
 public:
  HeaderReader(std::string_view json, std::uint64_t file_bytes, const std::filesystem::path& path)
      : RecordReader(json, path),
        payload_begin_(rules::kHeaderLengthBytes + json.size()),
        payload_bytes_(file_bytes - payload_begin_) {
    metadata_.format = FileFormat::kSafetensors;
    metadata_.payload_bytes = file_bytes;
  }

  Metadata read() {
    read_text("the safetensors header", rules::kHeaderLengthBytes, [this](std::string_view name) {
      name_ = name;
      name == kUserMetadata ? read_user_metadata() : read_tensor();
      name_.reset();
    });
    check_places();
    return std::move(metadata_);
  }

 private:
  struct Offsets {
    std::uint64_t begin = 0;  ///< In the payload.
    std::uint64_t end = 0;
  };

  void read_user_metadata() {
    key_ = {};
    if (json_.null()) return;
    json_.object([this](std::string_view key) {
      user_key_ = rules::quoted(key);
      key_ = user_key_;
      metadata_.user_metadata.insert_or_assign(std::string(key), json_.string());
    });
  }

  void read_tensor() {
    if (metadata_.records.size() == rules::kMaxRecords) {
      fail("the safetensors header has more than " + std::to_string(rules::kMaxRecords) + " tensors");
    }
    if (has_nul(*name_)) fail(where() + " has a NUL character in its name");
    std::optional<std::string> dtype;
    std::optional<std::vector<std::int64_t>> shape;
    std::optional<Offsets> offsets;
    key_ = {};
    json_.object([&](std::string_view key) {
      key_ = key;
      if (key == "dtype") {
        dtype = json_.string();
      } else if (key == "shape") {
        shape = read_shape();
      } else if (key == "data_offsets") {
        offsets = read_offsets();
      } else {
        json_.skip();
      }
    });
    if (!dtype || !shape || !offsets) {
      fail(where() + " has no " + (!dtype ? "dtype" : !shape ? "shape" : "data_offsets"));
    }
    add_record(*dtype, *std::move(shape), *offsets);
  }

  Offsets read_offsets() {
    std::size_t count = 0;
    std::array<std::uint64_t, 2> offsets{};
    json_.array([&] {
      const std::uint64_t offset = json_.count();
      if (count < offsets.size()) offsets[count] = offset;
      ++count;
    });
    if (count != offsets.size()) fail(subject() + " has " + std::to_string(count) + " numbers, not 2");
    return {offsets[0], offsets[1]};
  }

  void add_record(std::string_view dtype, std::vector<std::int64_t> shape, Offsets offsets) {
    const auto& [begin, end] = offsets;
    const std::string range = std::to_string(begin) + " to " + std::to_string(end);
    if (begin > end) fail(where() + " has data_offsets that end before they begin: " + range);
    if (end > payload_bytes_) {
      fail(where() + " has the bytes " + range + " of the payload, but the file has only " +
           std::to_string(payload_bytes_) + " of them: " + rules::kCutFile);
    }
    const DType type = dtype_called(dtype);
    if (type == DType::kFloat4E2M1FNX2) pack_in_pairs(shape);
    std::uint64_t size_bytes = 0;
    const std::optional<std::uint64_t> count = rules::element_count(shape);
    if (!count || __builtin_mul_overflow(*count, element_bytes(type), &size_bytes))
      fail(where() + " has a shape whose size passes 2^63");
    if (size_bytes != end - begin) {
      fail(where() + " has " + std::to_string(end - begin) + " bytes, but its dtype and shape take " +
           std::to_string(size_bytes));
    }
    metadata_.records.push_back({.name = std::string(*name_),
                                 .dtype = type,
                                 .shape = std::move(shape),
                                 .offset_bytes = payload_begin_ + begin,
                                 .size_bytes = size_bytes});
  }

  DType dtype_called(std::string_view name) const {
    const auto found = std::ranges::find(kDTypes, name, &std::pair<std::string_view, DType>::first);
    if (found != kDTypes.end()) return found->second;
    const bool is_f6 = name == "F6_E2M3" || name == "F6_E3M2";
    fail(where() + " has the dtype " + rules::quoted(name) +
         (is_f6 ? ", which torch does not have" : ", which is not known"));
  }

  /// A header counts 4-bit floats, torch counts pairs of them.
  void pack_in_pairs(std::vector<std::int64_t>& shape) const {
    if (shape.empty() || shape.back() % 2 != 0) {
      fail(where() + " has 4-bit floats, which torch has only in pairs, but its last dim is odd");
    }
    shape.back() /= 2;
  }

  /// Sorts the tensors by their places, which have to cover the payload and must not overlap.
  void check_places() {
    std::vector<TensorRecord>& records = metadata_.records;
    std::ranges::stable_sort(
        records, {}, [](const TensorRecord& record) { return std::pair(record.offset_bytes, record.size_bytes); });
    std::uint64_t covered = payload_begin_;
    for (std::size_t i = 0; i < records.size(); ++i) {
      if (records[i].offset_bytes < covered) {
        rules::refuse(path_, tensor(records[i].name) + " overlaps " + tensor(records[i - 1].name),
                      records[i].offset_bytes);
      }
      if (records[i].offset_bytes > covered)
        refuse_hole(covered, records[i].offset_bytes, "before " + tensor(records[i].name));
      covered += records[i].size_bytes;
    }
    if (covered < metadata_.payload_bytes) refuse_hole(covered, metadata_.payload_bytes, "at the end of the file");
  }

  [[noreturn]] void refuse_hole(std::uint64_t begin, std::uint64_t end, const std::string& where) const {
    rules::refuse(path_, std::to_string(end - begin) + " bytes " + where + " belong to no tensor", begin);
  }

  static std::string tensor(std::string_view name) { return "tensor " + rules::quoted(name); }

  /// Names the header, or the tensor that is being read.
  std::string where() const override {
    if (!name_) return "the safetensors header";
    return *name_ == kUserMetadata ? std::string(*name_) : tensor(*name_);
  }
  const std::uint64_t payload_begin_;
  const std::uint64_t payload_bytes_;  // From payload_begin_ on.
  Metadata metadata_;
  std::optional<std::string_view> name_;  // Name of the tensor that is being read.
  std::string user_key_;                  // Text that key_ may point to.
};

std::optional<Codec::Place> locate_header(OpenedFile& file) {
  const std::string& head = file.head();
  // Some writers put spaces before the JSON.
  const std::size_t first = head.find_first_not_of(" \t\r\n", rules::kHeaderLengthBytes);
  if (first == head.npos || head[first] != '{') return std::nullopt;
  const std::uint64_t length_bytes = rules::length_at(head, 0);
  if (length_bytes >= kNoHeaderBytes) return std::nullopt;
  file.check_limit("safetensors header", length_bytes, kMaxSafetensorsHeaderBytes, 0);
  if (length_bytes > file.size_bytes() - rules::kHeaderLengthBytes) {
    rules::refuse(file.path(), "its safetensors header of " + std::to_string(length_bytes) +
                                   " bytes goes past the end of the file: " + rules::kCutFile);
  }
  return Codec::Place{rules::kHeaderLengthBytes, length_bytes, file.size_bytes()};
}

[[noreturn]] void refuse_to_write(const std::string& what) {
  throw Error(Errc::kInvalidArgument, "a safetensors file cannot have " + what);
}

void check_names_to_write(std::span<const TensorSpec> tensors) {
  std::vector<std::string_view> names;
  for (const TensorSpec& tensor : tensors) names.push_back(tensor.name);
  if (const auto same = rules::find_duplicate(names))
    refuse_to_write("two tensors called " + rules::quoted(names[same->first]));
}

/// Returns the size in bytes of a tensor that a file can have.
std::uint64_t size_to_write(const TensorSpec& tensor) {
  const auto& [name, dtype, shape] = tensor;
  const std::string called = " called " + rules::quoted(name);
  if (name == kUserMetadata)
    refuse_to_write("a tensor" + called + ", which stands for something else there; a flashpack or .pt file can");
  if (has_nul(name))
    refuse_to_write("a tensor" + called + ", whose name has a NUL character; a flashpack or .pt file can");
  if (safetensors_dtype(dtype).empty())
    refuse_to_write("a tensor of " + std::string(dtype_name(dtype)) + called + "; a flashpack or .pt file can");
  if (dtype == DType::kFloat4E2M1FNX2 && shape.empty())
    refuse_to_write("a tensor" + called + " of 4-bit floats without a dim; a flashpack or .pt file can");
  const std::optional<std::uint64_t> count = rules::element_count(shape);
  std::uint64_t size_bytes = 0;
  if (!count || __builtin_mul_overflow(*count, std::uint64_t{element_bytes(dtype)}, &size_bytes))
    refuse_to_write("a tensor" + called + ", the size of whose shape passes 2^63");
  return size_bytes;
}

}  // namespace

const Codec kSafetensorsCodec = {FileFormat::kSafetensors, "safetensors", &locate_header, &parse_safetensors_header};

std::string_view safetensors_dtype(DType dtype) noexcept {
  const auto* const found = find_dtype(dtype);
  return found == kDTypes.end() ? std::string_view() : found->first;
}

std::vector<std::int64_t> safetensors_shape(DType dtype, std::vector<std::int64_t> shape) {
  const bool counts_pairs = dtype == DType::kFloat4E2M1FNX2 && !shape.empty();
  if (counts_pairs && __builtin_mul_overflow(shape.back(), 2, &shape.back()))
    refuse_to_write("a tensor with a dim that passes 2^63");
  return shape;
}

SafetensorsHeader make_safetensors_header(std::span<const TensorSpec> tensors,
                                          const std::optional<std::map<std::string, std::string>>& user_metadata) {
  if (tensors.size() > rules::kMaxRecords)
    refuse_to_write(std::to_string(tensors.size()) + " tensors, of which this library reads " +
                    std::to_string(rules::kMaxRecords));
  check_names_to_write(tensors);
  SafetensorsHeader header{.bytes = std::string(rules::kHeaderLengthBytes, '\0')};
  for (std::size_t i = 0; i < tensors.size(); ++i) header.order.push_back(i);
  std::ranges::sort(header.order, {}, [&](std::size_t i) {
    return std::pair(find_dtype(tensors[i].dtype), std::string_view(tensors[i].name));
  });
  JsonWriter json(header.bytes);
  json.begin('{');
  if (user_metadata) json.key(kUserMetadata).strings(*user_metadata);
  std::uint64_t end = 0;
  for (const std::size_t i : header.order) {
    const auto& [name, dtype, shape] = tensors[i];
    const std::uint64_t begin = end;
    if (__builtin_add_overflow(end, size_to_write(tensors[i]), &end))
      refuse_to_write("tensors whose sizes add up to more than 2^64");
    json.key(name).begin('{');
    json.key("dtype").string(safetensors_dtype(dtype));
    json.key("shape").numbers(safetensors_shape(dtype, shape));
    json.key("data_offsets").numbers(std::array{begin, end});
    json.end('}');
  }
  json.end('}');
  header.bytes.append(-header.bytes.size() % kPayloadAlignBytes, ' ');
  const std::uint64_t length_bytes = header.bytes.size() - rules::kHeaderLengthBytes;
  if (length_bytes > kMaxSafetensorsHeaderBytes)
    refuse_to_write("a header of " + std::to_string(length_bytes) + " bytes, which no reader takes");
  std::memcpy(header.bytes.data(), &length_bytes, sizeof length_bytes);
  return header;
}

Metadata parse_safetensors_header(std::string_view json, std::uint64_t file_bytes, const std::filesystem::path& path) {
  if (json.size() > kMaxSafetensorsHeaderBytes || file_bytes < rules::kHeaderLengthBytes ||
      json.size() > file_bytes - rules::kHeaderLengthBytes) {
    rules::refuse(path, "the safetensors header of " + std::to_string(json.size()) + " bytes does not fit");
  }
  return HeaderReader(json, file_bytes, path).read();
}

}  // namespace flashpack
