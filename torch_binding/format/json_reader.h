/// Reads JSON of unknown origin: the headers of checkpoints.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace flashpack {

/// Why a text is refused. what() is a sentence without its subject, "must be an array", because only the caller knows
/// what the text is about.
class JsonError : public std::runtime_error {
 public:
  enum class Subject : std::uint8_t { kText, kObject, kValue };

  JsonError(Subject subject, const std::string& what, std::size_t offset_bytes = 0)
      : std::runtime_error(what), subject_(subject), offset_bytes_(offset_bytes) {}

  /// The text as a whole, the object that has just been read to its end, or the value that was to come next.
  Subject subject() const noexcept { return subject_; }
  /// Where it is in the text, if the subject is the text.
  std::size_t offset_bytes() const noexcept { return offset_bytes_; }

 private:
  Subject subject_;
  std::size_t offset_bytes_;
};

/// Gives the values of one JSON text in the order in which they stand there, and builds no tree of them: it needs 16
/// bytes for each key of the objects that are open, and copies the keys and strings that have escapes.
///
/// Refuses what is not JSON to the letter (RFC 8259, UTF-8 without a mark, no comments, no trailing commas), more than
/// 8 levels, more than 2^20 keys in an object, and a key that an object has twice. The last costs n log n whatever the
/// keys are.
///
/// Each function reads the next value. It throws JsonError if that is of another type, or the text is refused.
/// Thread safety: one thread.
class JsonReader {
 public:
  /// Borrows `text`.
  explicit JsonReader(std::string_view text);
  ~JsonReader();
  JsonReader(const JsonReader&) = delete;
  JsonReader& operator=(const JsonReader&) = delete;

  /// Calls `member(key)` for each member. It has to read the value, and may keep `key` as long as this reader.
  template <typename Member>
  void object(Member member) {
    begin_object();
    while (const std::optional<std::string_view> key = next_key()) member(*key);
  }

  /// Calls `element()` for each element. It has to read it.
  template <typename Element>
  void array(Element element) {
    begin_array();
    while (next_is_element()) element();
  }

  std::string string();
  /// An integer from 0 to 2^63 - 1, written without a fraction or an exponent.
  std::uint64_t count();
  /// Whether the next value is null, which is then read.
  bool null();
  /// Passes over a value of any type, which is checked like all others.
  void skip();
  /// The text must end here.
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
