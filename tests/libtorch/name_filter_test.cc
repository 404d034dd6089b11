#include "flashpack/name_filter.h"

#include <gtest/gtest.h>

namespace flashpack {
namespace {

TEST(NameFilter, MatchesWholeNamesPrefixesAndSuffixesAndByDefaultNothing) {
  const NameFilter filter{.names = {"a.b"}, .prefixes = {"head."}, .suffixes = {".bias"}};
  EXPECT_TRUE(filter.matches("a.b"));
  EXPECT_TRUE(filter.matches("head.weight"));
  EXPECT_TRUE(filter.matches("x.bias"));
  EXPECT_FALSE(filter.matches("a.b.c"));
  EXPECT_FALSE(filter.matches("my.head.weight"));
  EXPECT_FALSE(filter.matches("x.bias.y"));
  EXPECT_FALSE(NameFilter{}.matches(""));
}

}  // namespace
}  // namespace flashpack
