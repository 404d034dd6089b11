#include "torch_binding/format/json_reader.h"

#include <algorithm>
#include <boost/json/basic_parser_impl.hpp>
#include <cassert>
#include <deque>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "torch_binding/format/format_rules.h"

namespace flashpack {

namespace {

enum class Kind : std::uint8_t {
  kObject,
  kObjectEnd,
  kArray,
  kArrayEnd,
  kKey,
  kString,
  kInteger,
  kHugeInteger,  // From 2^63 to 2^64 - 1.
  kNull,
  kOther,
  kTextEnd,
};

struct Event {
  Kind kind;
  std::uint64_t number = 0;
  std::string_view text;  // Key or string, in the whole text or in Handler::copies.
};

/// Notes the events of Boost.JSON's basic_parser, which gives these functions their names.
struct Handler {
  static constexpr std::size_t max_object_size = std::size_t{1} << 20;
  static constexpr std::size_t max_array_size = std::numeric_limits<std::uint32_t>::max();
  static constexpr std::size_t max_key_size = std::numeric_limits<std::size_t>::max();
  static constexpr std::size_t max_string_size = std::numeric_limits<std::size_t>::max();

  using ErrorCode = boost::json::error_code;
  using Text = boost::json::string_view;

  bool add(Kind kind, std::uint64_t number = 0) {
    events.push_back({kind, number, {}});
    return true;
  }
  bool add_part(Text part) {
    parts += part;
    return true;
  }
  bool add_text(Kind kind, Text part) {
    const bool stands_there = parts.empty() && part.data() >= text.data() && part.data() <= text.data() + text.size();
    if (!stands_there) copies.push_back(std::exchange(parts, {}).append(part.data(), part.size()));
    events.push_back({kind, 0, stands_there ? std::string_view(part.data(), part.size()) : copies.back()});
    return true;
  }

  bool on_document_begin(ErrorCode&) { return true; }
  bool on_document_end(ErrorCode&) { return true; }
  bool on_object_begin(ErrorCode&) { return add(Kind::kObject); }
  bool on_object_end(std::size_t, ErrorCode&) { return add(Kind::kObjectEnd); }
  bool on_array_begin(ErrorCode&) { return add(Kind::kArray); }
  bool on_array_end(std::size_t, ErrorCode&) { return add(Kind::kArrayEnd); }
  bool on_key_part(Text part, std::size_t, ErrorCode&) { return add_part(part); }
  bool on_key(Text part, std::size_t, ErrorCode&) { return add_text(Kind::kKey, part); }
  bool on_string_part(Text part, std::size_t, ErrorCode&) { return add_part(part); }
  bool on_string(Text part, std::size_t, ErrorCode&) { return add_text(Kind::kString, part); }
  bool on_number_part(Text, ErrorCode&) { return true; }
  bool on_int64(std::int64_t value, Text, ErrorCode&) { return add(Kind::kInteger, static_cast<std::uint64_t>(value)); }
  bool on_uint64(std::uint64_t value, Text, ErrorCode&) { return add(Kind::kHugeInteger, value); }
  bool on_double(double, Text, ErrorCode&) { return add(Kind::kOther); }
  bool on_bool(bool, ErrorCode&) { return add(Kind::kOther); }
  bool on_null(ErrorCode&) { return add(Kind::kNull); }
  bool on_comment_part(Text, ErrorCode&) { return true; }
  bool on_comment(Text, ErrorCode&) { return true; }

  std::string_view text;  // The whole text.
  std::vector<Event> events;
  std::string parts;               // Parts of the key or string that is being received.
  std::deque<std::string> copies;  // Keys and strings that have escapes or came in parts.
};

boost::json::parse_options options() {
  boost::json::parse_options options;
  options.max_depth = 8;  // A bound, and not tuned: what the formats have is flatter.
  return options;
}

}  // namespace

/// Turns Boost's parser, which pushes events, into one that is asked for the next event, by parsing a window ahead.
class JsonReader::Events {
 public:
  explicit Events(std::string_view text) : rest_(text), parser_(options()) { handler_.text = text; }

  /// The result is valid until the next call.
  const Event& peek() {
    while (next_ == handler_.events.size()) parse_more();
    return handler_.events[next_];
  }
  const Event& take() {
    const Event& event = peek();
    ++next_;
    return event;
  }
  const Event& take(Kind kind, const char* article_and_type) {
    const Event& event = take();
    if (event.kind == kind) return event;
    throw JsonError(JsonError::Subject::kValue, std::string("must be ") + article_and_type);
  }

  void open_object() { objects_.push_back(keys_.size()); }
  void add_key(std::string_view key) { keys_.push_back(key); }
  void close_object();

 private:
  void parse_more();

  std::string_view rest_;
  std::optional<JsonError> error_;  // Thrown after all events so far.
  boost::json::basic_parser<Handler> parser_;
  Handler& handler_ = parser_.handler();
  std::size_t next_ = 0;                // Index in Handler::events.
  std::vector<std::string_view> keys_;  // Keys of all objects that are open.
  std::vector<std::size_t> objects_;    // For each open object, the index of its first key.
};

void JsonReader::Events::parse_more() {
  if (error_) throw *error_;
  handler_.events.clear();
  next_ = 0;
  const std::size_t size = std::min(rest_.size(), kWindowBytes);
  boost::json::error_code error;
  const std::size_t parsed = parser_.write_some(size < rest_.size(), rest_.data(), size, error);
  rest_.remove_prefix(parsed);
  const std::size_t offset_bytes = handler_.text.size() - rest_.size();
  if (error) {
    error_.emplace(JsonError::Subject::kText, "is not valid JSON: " + error.message(), offset_bytes);
  } else if (parsed < size) {
    error_.emplace(JsonError::Subject::kText, "goes on after its JSON ends", offset_bytes);
  } else if (rest_.empty()) {
    handler_.add(Kind::kTextEnd);
  }
}

void JsonReader::Events::close_object() {
  const auto keys = std::span(keys_).subspan(objects_.back());
  if (const auto twice = rules::find_duplicate(keys)) {
    throw JsonError(JsonError::Subject::kObject, "has the key " + rules::quoted(keys[twice->first]) + " twice");
  }
  keys_.resize(objects_.back());
  objects_.pop_back();
}

JsonReader::JsonReader(std::string_view text) : events_(std::make_unique<Events>(text)) {}
JsonReader::~JsonReader() = default;

void JsonReader::begin_object() {
  events_->take(Kind::kObject, "an object");
  events_->open_object();
}

std::optional<std::string_view> JsonReader::next_key() {
  const Event& event = events_->take();
  if (event.kind == Kind::kKey) {
    events_->add_key(event.text);
    return event.text;
  }
  assert(event.kind == Kind::kObjectEnd && "the value of each key is read or skipped");
  events_->close_object();
  return std::nullopt;
}

void JsonReader::begin_array() { events_->take(Kind::kArray, "an array"); }

bool JsonReader::next_is_element() {
  if (events_->peek().kind != Kind::kArrayEnd) return true;
  events_->take();
  return false;
}

std::string JsonReader::string() { return std::string(events_->take(Kind::kString, "a string").text); }

std::uint64_t JsonReader::count() {
  if (const Event& event = events_->peek(); event.kind == Kind::kHugeInteger) {
    throw JsonError(JsonError::Subject::kValue, "is " + std::to_string(event.number) + ", which is past 2^63");
  }
  const auto value = static_cast<std::int64_t>(events_->take(Kind::kInteger, "an integer").number);
  if (value < 0) throw JsonError(JsonError::Subject::kValue, "must be >= 0, not " + std::to_string(value));
  return static_cast<std::uint64_t>(value);
}

bool JsonReader::null() {
  if (events_->peek().kind != Kind::kNull) return false;
  events_->take();
  return true;
}

void JsonReader::skip() {
  switch (events_->peek().kind) {
    case Kind::kObject:
      return object([this](std::string_view) { skip(); });
    case Kind::kArray:
      return array([this] { skip(); });
    default:
      events_->take();
  }
}

void JsonReader::end() { events_->take(Kind::kTextEnd, "the end of the text"); }

}  // namespace flashpack
