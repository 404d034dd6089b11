/// The parts that the readers of footers and headers share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "torch_binding/format/format_rules.h"
#include "torch_binding/format/json_reader.h"

namespace flashpack {

/// Reads the JSON of one file, and knows where in it the reader is, for messages. Throws Error (kBadFile) at the first
/// broken rule. Thread safety: one thread.
class RecordReader {
 protected:
  RecordReader(std::string_view json, const std::filesystem::path& path) : json_(json), path_(path) {}
  RecordReader(const RecordReader&) = delete;
  RecordReader& operator=(const RecordReader&) = delete;
  ~RecordReader() = default;

  /// Names the whole, or the part of it that is being read.
  virtual std::string where() const = 0;
  /// Names the value that comes next.
  std::string subject() const { return key_.empty() ? where() : where() + ": " + std::string(key_); }

  [[noreturn]] void fail(const std::string& sentence) const { rules::refuse(path_, sentence); }

  /// Calls `member(key)` for each member of the object that the text has to be. `whole` names the text, which the file
  /// has at `offset_bytes`.
  template <typename Member>
  void read_text(const char* whole, std::uint64_t offset_bytes, Member member) {
    try {
      json_.object(member);
      json_.end();
    } catch (const JsonError& error) {
      const bool is_text = error.subject() == JsonError::Subject::kText;
      rules::refuse(path_, error.sentence(whole, where(), subject()),
                    is_text ? offset_bytes + error.offset_bytes() : Error::kNoOffset);
    }
  }

  std::vector<std::int64_t> read_shape() {
    dims_.clear();
    json_.array([&] {
      key_ = "a dim of shape";
      dims_.push_back(static_cast<std::int64_t>(json_.count()));
      if (dims_.size() > rules::kMaxRank) {
        fail(subject() + " has more than " + std::to_string(rules::kMaxRank) + " dims");
      }
    });
    return dims_;
  }

  JsonReader json_;
  const std::filesystem::path& path_;
  std::string_view key_;  // Key of the value that comes next, if known.

 private:
  std::vector<std::int64_t> dims_;  // A member so that its memory is used again.
};

}  // namespace flashpack
