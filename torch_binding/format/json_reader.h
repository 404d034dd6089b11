/// Reads JSON that may be hostile: the headers of checkpoints.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace flashpack {

/// Says why a text is refused. what() is a sentence without its subject, such as "must be an array", because only the
/// caller knows what to call the subject.
class JsonError : public std::runtime_error {
 public:
  enum class Subject : std::uint8_t { kText, kObject, kValue };

  JsonError(Subject subject, const std::string& what, std::size_t offset_bytes = 0)
      : std::runtime_error(what), subject_(subject), offset_bytes_(offset_bytes) {}

  /// The subject of what(): the whole text, the object that has just been read to its end, or the value that comes
  /// next.
  Subject subject() const noexcept { return subject_; }
  /// Returns what() after its subject, which is called one of these.
  std::string sentence(const std::string& text, const std::string& object, const std::string& value) const {
    return (subject_ == Subject::kText ? text : subject_ == Subject::kObject ? object : value) + " " + what();
  }
  /// Offset of the mistake in the text, if the subject is the text.
  std::size_t offset_bytes() const noexcept { return offset_bytes_; }

 private:
  Subject subject_;
  std::size_t offset_bytes_;
};

/// Gives the values of one JSON text in their order, and builds no tree of them. It needs 16 bytes for each key of the
/// objects that are open, and copies keys and strings that have escapes.
///
/// Refuses what is not JSON to the letter (RFC 8259, UTF-8 without a mark, no comments, no trailing commas), more than
/// 8 levels, more than 2^20 keys in an object, and a key that an object has twice. The check for such keys takes n log
/// n steps for any keys.
///
/// Each function reads the next value. It throws JsonError if the value is of another type or the text is refused.
/// Thread safety: one thread.
class JsonReader {
 public:
  /// The text is parsed in windows of this size, as values are asked for.
  static constexpr std::size_t kWindowBytes = std::size_t{16} << 10;

  /// Borrows `text`.
  explicit JsonReader(std::string_view text);
  ~JsonReader();
  JsonReader(const JsonReader&) = delete;
  JsonReader& operator=(const JsonReader&) = delete;

  /// Calls `member(key)` for each member; the call has to read the member's value. `key` is valid as long as this
  /// reader.
  template <typename Member>
  void object(Member member) {
    begin_object();
    while (const std::optional<std::string_view> key = next_key()) member(*key);
  }

  /// Calls `element()` for each element; the call has to read that element.
  template <typename Element>
  void array(Element element) {
    begin_array();
    while (next_is_element()) element();
  }

  std::string string();
  /// An integer from 0 to 2^63 - 1, written without a fraction or an exponent.
  std::uint64_t count();
  /// Whether the next value is null. If it is, it is read.
  bool null();
  /// Checks and skips a value of any type.
  void skip();
  /// Throws JsonError unless the text ends here.
  void end();

 private:
  class Events;

  void begin_object();
  std::optional<std::string_view> next_key();
  void begin_array();
  bool next_is_element();

  std::unique_ptr<Events> events_;
};

}  // namespace flashpack
