#include "torch_binding/format/footer_json.h"

#include <limits>
#include <utility>

#include "torch_binding/format/format_rules.h"
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

}  // namespace

FooterFields parse_footer_json(std::string_view json, std::uint64_t payload_bytes, const std::filesystem::path& path) {
  return FooterReader(json, path).read(payload_bytes);
}

}  // namespace flashpack
