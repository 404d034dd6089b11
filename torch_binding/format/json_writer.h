/// Writes JSON: the headers of checkpoints.
#pragma once

#include <concepts>
#include <map>
#include <string>
#include <string_view>

#include "torch_binding/format/format_rules.h"

namespace flashpack {

/// Appends JSON to a text, with the commas between values. Thread safety: one thread.
class JsonWriter {
 public:
  /// Borrows `out`.
  explicit JsonWriter(std::string& out) : out_(out) {}

  /// Begins and ends an object or an array.
  void begin(char bracket) {
    separate();
    out_ += bracket;
    is_first_ = true;
  }
  void end(char bracket) {
    out_ += bracket;
    is_first_ = false;
  }
  /// To be followed by the key's value.
  JsonWriter& key(std::string_view name) {
    string(name);
    out_ += ':';
    is_first_ = true;
    return *this;
  }
  void string(std::string_view utf8) {
    separate();
    rules::append_json_string(out_, utf8);
  }
  void number(std::integral auto value) {
    separate();
    out_ += std::to_string(value);
  }
  void numbers(const auto& values) {
    begin('[');
    for (const auto value : values) number(value);
    end(']');
  }
  void strings(const std::map<std::string, std::string>& values) {
    begin('{');
    for (const auto& [name, value] : values) key(name).string(value);
    end('}');
  }

 private:
  void separate() {
    if (!is_first_) out_ += ',';
    is_first_ = false;
  }

  std::string& out_;
  bool is_first_ = true;
};

}  // namespace flashpack
