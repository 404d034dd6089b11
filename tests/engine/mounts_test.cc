#include "engine/mounts.h"

#include <gtest/gtest.h>

namespace flashpack::internal {
namespace {

TEST(MountsTest, TheNearestMountPointAboveADirectoryIsFound) {
  Mounts mounts;
  EXPECT_EQ(mounts.above("/proc/self"), "") << "none is known yet";
  mounts.read();
  EXPECT_EQ(mounts.above("/proc"), "/proc");
  EXPECT_EQ(mounts.above("/proc/self/fd"), "/proc");
  EXPECT_EQ(mounts.above("/procession"), "/");
  EXPECT_EQ(mounts.above("/"), "/");
}

}  // namespace
}  // namespace flashpack::internal
