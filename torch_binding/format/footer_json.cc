#include "torch_binding/format/footer_json.h"

#include <limits>
#include <span>
#include <utility>

#include "torch_binding/format/format_rules.h"
#include "torch_binding/format/json_writer.h"
#include "torch_binding/format/record_reader.h"

namespace flashpack {

namespace {

/// Reads the keys of a footer.
class FooterReader final : RecordReader {
 public:
  FooterReader(std::string_view json, const std::filesystem::path& path) : RecordReader(json, path) {}

  FooterFields read(std::uint64_t payload_bytes) {
    read_text("the footer", payload_bytes, [this](std::string_view key) { read_field(key); });
    return std::move(fields_);
  }

 private:
  enum class Part : std::uint8_t { kFooter, kMacroblock, kRecord };

  void read_field(std::string_view key) {
    if (is(key, "format")) {
      fields_.format = json_.string();
    } else if (is(key, "target_dtype")) {
      fields_.target_dtype = json_.string();
    } else if (is(key, "crc32c_per_mib")) {
      fields_.crc32c_per_mib = json_.string();
    } else if (is(key, "footer_crc32c")) {
      fields_.footer_crc32c = json_.string();
    } else if (is(key, "align_bytes")) {
      fields_.align_bytes = json_.count();
    } else if (is(key, "total_elems")) {
      fields_.total_elems = json_.count();
    } else if (is(key, "total_payload_bytes")) {
      fields_.total_payload_bytes = json_.count();
    } else if (is(key, "macroblocks")) {
      read_list(Part::kMacroblock, [this] { read_macroblock(); });
      fields_.macroblocks = std::move(macroblocks_);
    } else if (is(key, "index")) {
      read_list(Part::kRecord, [this] { read_record(); });
      fields_.records = std::move(records_);
    } else if (is(key, "metadata")) {
      json_.object([this](std::string_view name) { read_user_metadata(name); });
    } else {
      skip();
    }
  }

  template <typename ReadOne>
  void read_list(Part part, ReadOne read_one) {
    json_.array([&] {
      part_ = part;
      key_ = {};
      read_one();
    });
    part_ = Part::kFooter;
  }

  void read_macroblock() {
    if (macroblocks_.size() == rules::kMaxMacroblocks) {
      fail("the footer has more than " + std::to_string(rules::kMaxMacroblocks) + " macroblocks");
    }
    std::optional<DType> dtype;
    std::optional<std::uint64_t> offset_bytes;
    std::optional<std::uint64_t> length_bytes;
    std::optional<std::uint64_t> length_elems;
    json_.object([&](std::string_view key) {
      if (is(key, "dtype")) {
        dtype = read_dtype();
      } else if (is(key, "offset_bytes")) {
        offset_bytes = json_.count();
      } else if (is(key, "length_bytes")) {
        length_bytes = json_.count();
      } else if (is(key, "length_elems")) {
        length_elems = json_.count();
      } else {
        fail(where() + " has the key " + rules::quoted(key) +
             ", which this version does not know: its bytes may be encoded and would be read wrongly");
      }
    });
    macroblocks_.push_back({.dtype = require(dtype, "dtype"),
                            .offset_bytes = require(offset_bytes, "offset_bytes"),
                            .length_bytes = require(length_bytes, "length_bytes"),
                            .length_elems = require(length_elems, "length_elems")});
  }

  DType read_dtype() {
    const std::string name = json_.string();
    const std::optional<DType> dtype = dtype_from_name(name);
    if (!dtype) fail(where() + ": Unsupported dtype string in metadata: " + rules::quoted(name));
    return *dtype;
  }

  void read_record() {
    if (records_.size() == rules::kMaxRecords) {
      fail("the index has more than " + std::to_string(rules::kMaxRecords) + " records");
    }
    name_.reset();
    std::optional<std::vector<std::int64_t>> shape;
    std::optional<std::uint64_t> offset;
    std::optional<std::uint64_t> length;
    std::uint64_t macroblock = 0;
    json_.object([&](std::string_view key) {
      if (is(key, "name")) {
        name_.reset();
        name_ = json_.string();
      } else if (is(key, "shape")) {
        shape = read_shape();
      } else if (is(key, "offset")) {
        offset = json_.count();
      } else if (is(key, "length")) {
        length = json_.count();
      } else if (is(key, "macroblock")) {
        macroblock = json_.null() ? 0 : json_.count();
      } else {
        skip();
      }
    });
    require(name_, "name");
    if (macroblock > std::numeric_limits<std::uint32_t>::max()) {
      fail(where() + " references macroblock " + std::to_string(macroblock) + ", but no file has that many");
    }
    // The name is moved last, because messages about the other fields need it.
    RecordFields record{.shape = require(std::move(shape), "shape"),
                        .offset_elems = require(offset, "offset"),
                        .length_elems = require(length, "length"),
                        .macroblock = static_cast<std::uint32_t>(macroblock)};
    record.name = *std::move(name_);
    records_.push_back(std::move(record));
  }

  void read_user_metadata(std::string_view name) {
    const auto [user_value, is_first] = fields_.user_metadata.try_emplace(std::string(name));
    if (!is_first) fail("the footer has the metadata " + rules::quoted(name) + " twice");
    user_key_ = "metadata " + rules::quoted(name);
    key_ = user_key_;
    user_value->second = json_.string();
  }

  void skip() {
    key_ = {};
    json_.skip();
  }

  bool is(std::string_view key, std::string_view name) {
    if (key != name) return false;
    key_ = name;
    return true;
  }

  template <typename T>
  T require(std::optional<T> field, const char* key) const {
    if (!field) fail(where() + " has no " + key);
    return *std::move(field);
  }

  /// Names the footer, or the macroblock or record that is being read.
  std::string where() const override {
    if (part_ == Part::kFooter) return "the footer";
    if (part_ == Part::kMacroblock) return "macroblock " + std::to_string(macroblocks_.size());
    const std::string record = "record " + std::to_string(records_.size());
    return name_ ? record + " " + rules::quoted(*name_) : record;
  }

  FooterFields fields_;
  std::vector<Macroblock> macroblocks_;
  std::vector<RecordFields> records_;
  Part part_ = Part::kFooter;
  std::string user_key_;             // Text that key_ may point to.
  std::optional<std::string> name_;  // Name of the record that is being read, once known.
};

void write_macroblock(JsonWriter& json, const Macroblock& macroblock) {
  json.begin('{');
  json.key("dtype").string(dtype_name(macroblock.dtype));
  json.key("offset_bytes").number(macroblock.offset_bytes);
  json.key("length_bytes").number(macroblock.length_bytes);
  json.key("length_elems").number(macroblock.length_elems);
  json.end('}');
}

void write_record(JsonWriter& json, const Metadata& metadata, std::size_t i) {
  const TensorRecord& record = metadata.records[i];
  const std::uint32_t macroblock = metadata.container.macroblock_of[i];
  const std::uint64_t begin_bytes = metadata.container.macroblocks[macroblock].offset_bytes;
  const std::uint64_t width_bytes = element_bytes(record.dtype);
  json.begin('{');
  json.key("name").string(record.name);
  json.key("shape").numbers(record.shape);
  json.key("offset").number((record.offset_bytes - begin_bytes) / width_bytes);
  json.key("length").number(record.size_bytes / width_bytes);
  if (metadata.container.version == 4) json.key("macroblock").number(macroblock);
  json.end('}');
}

/// Writes all that precedes the records.
void write_preamble(JsonWriter& json, const Metadata& metadata) {
  const Container& container = metadata.container;
  const bool several = container.version == 4;
  json.begin('{');
  json.key("format").string(several ? "flashpack_v4" : "flashpack_v3");
  if (!several) json.key("target_dtype").string(dtype_name(container.macroblocks.front().dtype));
  json.key("align_bytes").number(container.align_bytes);
  if (several) json.key("total_payload_bytes").number(metadata.payload_bytes);
  json.key("total_elems").number(container.total_elems);
  if (several) {
    json.key("macroblocks").begin('[');
    for (const Macroblock& macroblock : container.macroblocks) write_macroblock(json, macroblock);
    json.end(']');
  }
  json.key("index").begin('[');
}

/// Writes all that follows the records. `out` is the text that `json` writes to.
void write_rest(JsonWriter& json, std::string& out, const Metadata& metadata, const Checksums* checksums) {
  json.end(']');
  if (!metadata.user_metadata.empty()) json.key("metadata").strings(metadata.user_metadata);
  if (checksums) {
    json.key("crc32c_per_mib");
    out += '"';
    for (const std::uint32_t crc : checksums->crc32c) rules::append_crc(out, crc);
    out += '"';
    out += rules::kFooterCrcKey;
    rules::append_crc(out, crc32c(std::as_bytes(std::span(out))));
    out += '"';
  }
  json.end('}');
}

}  // namespace

std::string footer_json(const Metadata& metadata, const Checksums* checksums) {
  std::string out;
  JsonWriter json(out);
  write_preamble(json, metadata);
  for (std::size_t i = 0; i < metadata.records.size(); ++i) write_record(json, metadata, i);
  write_rest(json, out, metadata, checksums);
  return out;
}

std::uint64_t footer_json_bytes(const Metadata& metadata, bool checksums) {
  // Each record's JSON is measured alone, because the whole may be larger than memory.
  std::string part;
  JsonWriter json(part);
  write_preamble(json, metadata);
  std::uint64_t json_bytes = checksums ? Checksums::stripes_in(metadata.payload_bytes) * rules::kCrcDigits : 0;
  for (std::size_t i = 0; i < metadata.records.size(); ++i) {
    write_record(json, metadata, i);
    json_bytes += part.size();
    part.clear();
  }
  const Checksums none;
  write_rest(json, part, metadata, checksums ? &none : nullptr);
  return json_bytes + part.size();
}

FooterFields parse_footer_json(std::string_view json, std::uint64_t payload_bytes, const std::filesystem::path& path) {
  return FooterReader(json, path).read(payload_bytes);
}

}  // namespace flashpack
