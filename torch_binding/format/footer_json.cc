#include "torch_binding/format/footer_json.h"

#include <array>
#include <boost/json/basic_parser_impl.hpp>
#include <limits>
#include <map>
#include <set>
#include <span>
#include <tuple>
#include <utility>

#include "torch_binding/format/format_rules.h"

namespace flashpack {

namespace {

enum class Type : std::uint8_t { kInteger, kString, kArray, kObject, kNull, kOther };

std::string_view type_name(Type type) {
  switch (type) {
    case Type::kInteger:
      return "an integer";
    case Type::kString:
      return "a string";
    case Type::kArray:
      return "an array";
    case Type::kObject:
      return "an object";
    default:
      return "something else";
  }
}

struct Key {
  std::string_view name;
  Type type;
};

// Indices into the tables of keys below.
namespace footer_key {
enum : std::size_t {
  kFormat,
  kTargetDType,
  kCrc32cPerMib,
  kFooterCrc32c,
  kAlignBytes,
  kTotalElems,
  kTotalPayloadBytes,
  kMacroblocks,
  kIndex,
  kMetadata,
};
}
namespace macroblock_key {
enum : std::size_t { kDType, kOffsetBytes, kLengthBytes, kLengthElems };
}
namespace record_key {
enum : std::size_t { kName, kShape, kOffset, kLength, kMacroblock };
}

constexpr std::array kFooterKeys = {Key{"format", Type::kString},
                                    Key{"target_dtype", Type::kString},
                                    Key{"crc32c_per_mib", Type::kString},
                                    Key{"footer_crc32c", Type::kString},
                                    Key{"align_bytes", Type::kInteger},
                                    Key{"total_elems", Type::kInteger},
                                    Key{"total_payload_bytes", Type::kInteger},
                                    Key{"macroblocks", Type::kArray},
                                    Key{"index", Type::kArray},
                                    Key{"metadata", Type::kObject}};
constexpr std::array kMacroblockKeys = {Key{"dtype", Type::kString}, Key{"offset_bytes", Type::kInteger},
                                        Key{"length_bytes", Type::kInteger}, Key{"length_elems", Type::kInteger}};
constexpr std::array kRecordKeys = {Key{"name", Type::kString}, Key{"shape", Type::kArray},
                                    Key{"offset", Type::kInteger}, Key{"length", Type::kInteger},
                                    Key{"macroblock", Type::kInteger}};
constexpr std::size_t kMaxKeys = kFooterKeys.size();
constexpr std::size_t kUnknownKey = kMaxKeys;

enum class Scope : std::uint8_t { kFooter, kMacroblocks, kMacroblock, kIndex, kRecord, kShape, kMetadata, kIgnored };

std::span<const Key> keys_of(Scope scope) {
  switch (scope) {
    case Scope::kFooter:
      return kFooterKeys;
    case Scope::kMacroblock:
      return kMacroblockKeys;
    case Scope::kRecord:
      return kRecordKeys;
    default:
      return {};
  }
}

/// An object or array that is open, and what it said so far.
struct Frame {
  explicit Frame(Scope opened) : scope(opened), keys(keys_of(opened)) {}

  bool has(std::size_t which) const { return ((seen >> which) & 1U) != 0; }

  Scope scope;
  std::span<const Key> keys;
  std::size_t key = kUnknownKey;  // Index in `keys` of the value that comes next.
  std::uint32_t seen = 0;         // Bit i: keys[i] has been met.
  std::array<std::uint64_t, kMaxKeys> integers{};
  std::array<std::string, 4> strings;           // In every table the strings stand first.
  std::set<std::string, std::less<>> others{};  // Keys that are not in `keys`.
};

/// Receives the events of Boost.JSON's basic_parser, whose names these are. Throws Error at the first broken rule.
class FooterHandler {
 public:
  // A real footer has objects of at most 9 keys; the limit bounds what the set of keys may cost.
  static constexpr std::size_t max_object_size = std::size_t{1} << 20;
  static constexpr std::size_t max_array_size = std::numeric_limits<std::uint32_t>::max();
  static constexpr std::size_t max_key_size = std::numeric_limits<std::size_t>::max();
  static constexpr std::size_t max_string_size = std::numeric_limits<std::size_t>::max();

  explicit FooterHandler(const std::filesystem::path& path) : path_(path) {}

  FooterFields take() { return std::move(fields_); }

  using ErrorCode = boost::json::error_code;
  using Text = boost::json::string_view;

  bool on_document_begin(ErrorCode&) { return true; }
  bool on_document_end(ErrorCode&) { return true; }
  bool on_object_begin(ErrorCode&) {
    expect(Type::kObject);
    const Scope scope = scope_of_object();
    if (scope == Scope::kRecord && records_.size() == rules::kMaxRecords) {
      fail("the index has more than " + std::to_string(rules::kMaxRecords) + " records");
    }
    if (scope == Scope::kMacroblock && macroblocks_.size() == rules::kMaxMacroblocks) {
      fail("the footer has more than " + std::to_string(rules::kMaxMacroblocks) + " macroblocks");
    }
    frames_.emplace_back(scope);
    return true;
  }
  bool on_object_end(std::size_t, ErrorCode&) {
    close_object();
    frames_.pop_back();
    return true;
  }
  bool on_array_begin(ErrorCode&) {
    expect(Type::kArray);
    open_array();
    return true;
  }
  bool on_array_end(std::size_t, ErrorCode&) {
    frames_.pop_back();
    return true;
  }
  bool on_key_part(Text part, std::size_t, ErrorCode&) {
    text_ += part;
    return true;
  }
  bool on_key(Text part, std::size_t, ErrorCode&) {
    text_ += part;
    open_key();
    text_.clear();
    return true;
  }
  bool on_string_part(Text part, std::size_t, ErrorCode&) {
    text_ += part;
    return true;
  }
  bool on_string(Text part, std::size_t, ErrorCode&) {
    expect(Type::kString);
    text_ += part;
    Frame& frame = frames_.back();
    if (frame.scope == Scope::kMetadata) {
      user_value_->second = text_;
    } else if (frame.key != kUnknownKey) {
      frame.strings[frame.key] = text_;
    }
    text_.clear();
    return true;
  }
  bool on_number_part(Text, ErrorCode&) { return true; }
  bool on_int64(std::int64_t value, Text, ErrorCode&) {
    expect(Type::kInteger);
    store(value);
    return true;
  }
  bool on_uint64(std::uint64_t value, Text, ErrorCode&) {
    expect(Type::kInteger);
    if (wanted()) fail(subject() + " is " + std::to_string(value) + ", which is past 2^63");
    return true;
  }
  bool on_double(double, Text, ErrorCode&) {
    expect(Type::kOther);
    return true;
  }
  bool on_bool(bool, ErrorCode&) {
    expect(Type::kOther);
    return true;
  }
  bool on_null(ErrorCode&) {
    const Frame* frame = frames_.empty() ? nullptr : &frames_.back();
    const bool first_macroblock =
        frame != nullptr && frame->scope == Scope::kRecord && frame->key == record_key::kMacroblock;
    if (!first_macroblock) expect(Type::kNull);
    return true;
  }
  bool on_comment_part(Text, ErrorCode&) { return true; }
  bool on_comment(Text, ErrorCode&) { return true; }

 private:
  /// The one type that may come next; empty when any may.
  std::optional<Type> wanted() const {
    if (frames_.empty()) return Type::kObject;
    const Frame& frame = frames_.back();
    switch (frame.scope) {
      case Scope::kMacroblocks:
      case Scope::kIndex:
        return Type::kObject;
      case Scope::kShape:
        return Type::kInteger;
      case Scope::kMetadata:
        return Type::kString;
      default:
        return frame.key == kUnknownKey ? std::nullopt : std::optional(frame.keys[frame.key].type);
    }
  }

  void expect(Type type) const {
    const std::optional<Type> want = wanted();
    if (want && *want != type) fail(subject() + " must be " + std::string(type_name(*want)));
  }

  Scope scope_of_object() const {
    if (frames_.empty()) return Scope::kFooter;
    const Frame& frame = frames_.back();
    switch (frame.scope) {
      case Scope::kFooter:
        return frame.key == footer_key::kMetadata ? Scope::kMetadata : Scope::kIgnored;
      case Scope::kMacroblocks:
        return Scope::kMacroblock;
      case Scope::kIndex:
        return Scope::kRecord;
      default:
        return Scope::kIgnored;
    }
  }

  void open_array() {
    const Frame& frame = frames_.back();
    Scope scope = Scope::kIgnored;
    if (frame.scope == Scope::kFooter && frame.key == footer_key::kMacroblocks) {
      scope = Scope::kMacroblocks;
    } else if (frame.scope == Scope::kFooter && frame.key == footer_key::kIndex) {
      scope = Scope::kIndex;
    } else if (frame.scope == Scope::kRecord && frame.key == record_key::kShape) {
      scope = Scope::kShape;
      shape_.clear();
    }
    frames_.emplace_back(scope);
  }

  void open_key() {
    Frame& frame = frames_.back();
    if (frame.scope == Scope::kMetadata) return open_user_key();
    frame.key = kUnknownKey;
    for (std::size_t i = 0; i < frame.keys.size(); ++i) {
      if (frame.keys[i].name == text_) frame.key = i;
    }
    if (frame.key == kUnknownKey) {
      if (frame.scope == Scope::kMacroblock) {
        fail(where() + " has the key " + rules::quoted(text_) +
             ", which this version does not know: its bytes may be encoded and would be read wrongly");
      }
      if (!frame.others.insert(text_).second) fail(where() + " has the key " + rules::quoted(text_) + " twice");
      return;
    }
    if (frame.has(frame.key)) fail(where() + " has the key " + rules::quoted(text_) + " twice");
    frame.seen |= 1U << frame.key;
  }

  void open_user_key() {
    bool is_new = false;
    std::tie(user_value_, is_new) = fields_.user_metadata.try_emplace(text_);
    if (!is_new) fail("the footer has the metadata " + rules::quoted(text_) + " twice");
  }

  void store(std::int64_t value) {
    Frame& frame = frames_.back();
    if (!wanted()) return;
    if (value < 0) fail(subject() + " must be >= 0, not " + std::to_string(value));
    if (frame.scope != Scope::kShape) {
      frame.integers[frame.key] = static_cast<std::uint64_t>(value);
      return;
    }
    if (shape_.size() == rules::kMaxRank)
      fail(subject() + " has more than " + std::to_string(rules::kMaxRank) + " dims");
    shape_.push_back(value);
  }

  void close_object() {
    Frame& frame = frames_.back();
    switch (frame.scope) {
      case Scope::kFooter:
        return close_footer(frame);
      case Scope::kMacroblock:
        return close_macroblock(frame);
      case Scope::kRecord:
        return close_record(frame);
      default:
        return;
    }
  }

  void close_footer(Frame& frame) {
    using namespace footer_key;
    if (frame.has(kFormat)) fields_.format = std::move(frame.strings[kFormat]);
    if (frame.has(kTargetDType)) fields_.target_dtype = std::move(frame.strings[kTargetDType]);
    if (frame.has(kCrc32cPerMib)) fields_.crc32c_per_mib = std::move(frame.strings[kCrc32cPerMib]);
    if (frame.has(kFooterCrc32c)) fields_.footer_crc32c = std::move(frame.strings[kFooterCrc32c]);
    if (frame.has(kAlignBytes)) fields_.align_bytes = frame.integers[kAlignBytes];
    if (frame.has(kTotalElems)) fields_.total_elems = frame.integers[kTotalElems];
    if (frame.has(kTotalPayloadBytes)) fields_.total_payload_bytes = frame.integers[kTotalPayloadBytes];
    if (frame.has(kMacroblocks)) fields_.macroblocks = std::move(macroblocks_);
    if (frame.has(kIndex)) fields_.records = std::move(records_);
  }

  void close_macroblock(const Frame& frame) {
    using namespace macroblock_key;
    require(frame, kMacroblockKeys.size());
    const std::optional<DType> dtype = dtype_from_name(frame.strings[kDType]);
    if (!dtype) fail(where() + ": Unsupported dtype string in metadata: " + rules::quoted(frame.strings[kDType]));
    macroblocks_.push_back({.dtype = *dtype,
                            .offset_bytes = frame.integers[kOffsetBytes],
                            .length_bytes = frame.integers[kLengthBytes],
                            .length_elems = frame.integers[kLengthElems]});
  }

  void close_record(Frame& frame) {
    using namespace record_key;
    require(frame, kMacroblock);
    const std::uint64_t macroblock = frame.integers[kMacroblock];
    if (macroblock > std::numeric_limits<std::uint32_t>::max()) {
      fail(where() + " references macroblock " + std::to_string(macroblock) + ", but no file has that many");
    }
    records_.push_back({.name = std::move(frame.strings[kName]),
                        .shape = std::move(shape_),
                        .offset_elems = frame.integers[kOffset],
                        .length_elems = frame.integers[kLength],
                        .macroblock = static_cast<std::uint32_t>(macroblock)});
  }

  /// The first `count` keys of the frame's table must have been met.
  void require(const Frame& frame, std::size_t count) const {
    for (std::size_t i = 0; i < count; ++i) {
      if (!frame.has(i)) fail(where() + " has no " + std::string(frame.keys[i].name));
    }
  }

  /// The innermost macroblock or record that is open, for messages.
  std::string where() const {
    for (auto frame = frames_.rbegin(); frame != frames_.rend(); ++frame) {
      if (frame->scope == Scope::kMacroblock || frame->scope == Scope::kMacroblocks) {
        return "macroblock " + std::to_string(macroblocks_.size());
      }
      if (frame->scope == Scope::kRecord || frame->scope == Scope::kIndex) {
        std::string record = "record " + std::to_string(records_.size());
        const bool named = frame->has(record_key::kName) && frame->key != record_key::kName;
        if (named) record += " " + rules::quoted(frame->strings[record_key::kName]);
        return record;
      }
    }
    return "the footer";
  }

  /// The value that comes next, for messages.
  std::string subject() const {
    if (frames_.empty()) return "the footer";
    const Frame& frame = frames_.back();
    if (frame.scope == Scope::kShape) return where() + ": a dim of shape";
    if (frame.scope == Scope::kMetadata) return where() + ": metadata " + rules::quoted(user_value_->first);
    if (frame.key == kUnknownKey) return where();
    return where() + ": " + std::string(frame.keys[frame.key].name);
  }

  [[noreturn]] void fail(const std::string& sentence) const { rules::refuse(path_, sentence); }

  const std::filesystem::path& path_;
  FooterFields fields_;
  std::vector<Macroblock> macroblocks_;
  std::vector<TensorRecord> records_;
  std::vector<Frame> frames_;
  std::string text_;  // Of the key or string being received in parts.
  std::vector<std::int64_t> shape_;
  std::map<std::string, std::string>::iterator user_value_;  // Where the string that comes next belongs.
};

}  // namespace

FooterFields parse_footer_json(std::string_view json, std::uint64_t payload_bytes, const std::filesystem::path& path) {
  boost::json::parse_options options;
  options.max_depth = 8;
  boost::json::basic_parser<FooterHandler> parser(options, path);
  boost::json::error_code error;
  const std::size_t consumed = parser.write_some(false, json.data(), json.size(), error);
  if (error) rules::refuse(path, "the footer is not valid JSON: " + error.message(), payload_bytes + consumed);
  if (consumed != json.size()) rules::refuse(path, "the footer goes on after its JSON ends", payload_bytes + consumed);
  return parser.handler().take();
}

}  // namespace flashpack
