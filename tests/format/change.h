/// Tables of JSON texts that parsers must refuse, each a good text with one change.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <ostream>
#include <string>
#include <string_view>

namespace flashpack::test {

/// A good text in which `from` becomes `to`. An empty `from` means the whole text.
struct Change {
  std::string_view test;
  std::string_view good;
  std::string_view from;
  std::string to;
  std::string_view expected;  ///< What the error, or the one warning, must say.

  std::string text() const {
    std::string changed(good);
    const std::size_t at = changed.find(from);
    EXPECT_NE(at, std::string::npos) << "the text has no " << from;
    return changed.replace(at, from.empty() ? changed.size() : from.size(), to);
  }
};

inline void PrintTo(const Change& change, std::ostream* out) { *out << change.test; }

inline std::string test_name(const ::testing::TestParamInfo<Change>& change) { return std::string(change.param.test); }

}  // namespace flashpack::test
