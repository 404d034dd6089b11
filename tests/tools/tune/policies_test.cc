#include "tools/tune/policies.h"

#include <gtest/gtest.h>

namespace flashpack::bench {
namespace {

std::vector<PolicyCell> cells(double automatic, double direct, double buffered) {
  return {{CachePolicy::kAuto, 3, automatic}, {CachePolicy::kDirect, 3, direct}, {CachePolicy::kBuffered, 3, buffered}};
}

TEST(Policies, OnlyAPolicyThatIsFasterByMoreThanTheToleranceIsBetterThanAuto) {
  EXPECT_EQ(choose(cells(2, 2.05, 1)).policy, CachePolicy::kAuto);
  EXPECT_EQ(choose(cells(2, 2.07, 1)).policy, CachePolicy::kDirect);
  EXPECT_EQ(choose(cells(2, 2.07, 3)).policy, CachePolicy::kBuffered);
}

}  // namespace
}  // namespace flashpack::bench
