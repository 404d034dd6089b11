#include "engine/mounts.h"

#include <gtest/gtest.h>

#include <sstream>
#include <string>

namespace flashpack::internal {
namespace {

std::string point_of(const Mounts& mounts, const char* path) {
  const MountInfo* const mount = mounts.find(path);
  return mount ? mount->point : "none";
}

TEST(MountsTest, TheNearestMountAboveAPathIsFound) {
  const Mounts mounts = Mounts::of_process();
  EXPECT_EQ(point_of(mounts, "/proc"), "/proc");
  EXPECT_EQ(point_of(mounts, "/proc/self/fd"), "/proc");
  EXPECT_EQ(mounts.find("/proc/self/fd")->file_system, "proc");
  EXPECT_EQ(point_of(mounts, "/procession"), "/");
  EXPECT_EQ(point_of(mounts, "/"), "/");
}

TEST(MountsTest, NoMountIsKnownAtFirst) { EXPECT_EQ(Mounts().find("/proc/self"), nullptr); }

TEST(MountsTest, AMountHasItsNameWithoutEscapesAndALaterOneHidesItFromOthers) {
  std::istringstream lines(
      "36 35 98:0 /mnt1 /mnt\\040with\\040blanks rw,noatime master:1 shared:2 - ext3 /dev/a\\134b rw\n"
      "37 35 98:1 / /mnt2 rw - xfs /dev/first rw\n"
      "38 35 98:2 / /mnt2 rw - ext4 /dev/second rw\n"
      "39 35 98:3 / /mnt3 damaged\n");
  const Mounts mounts(lines);
  const MountInfo* const blanks = mounts.find("/mnt with blanks/file");
  ASSERT_NE(blanks, nullptr);
  EXPECT_EQ(blanks->file_system, "ext3");
  EXPECT_EQ(blanks->source, "/dev/a\\b");
  ASSERT_NE(mounts.find("/mnt2"), nullptr);
  EXPECT_EQ(mounts.find("/mnt2")->source, "/dev/second");
  EXPECT_EQ(mounts.find("/mnt3"), nullptr);
}

TEST(MountsTest, AMountIsFoundByItsNumberWhateverOptionalFieldsItHas) {
  std::istringstream lines(
      "7 1 0:5 / /proc rw - proc proc rw\n"
      "27 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw,discard\n"
      "277 27 0:50 / /models rw - nfs4 server:/export rw\n"
      "28 1 254:1 / / rw\n");
  const Mounts mounts(lines);
  const MountInfo* const mount = mounts.find(27);
  ASSERT_NE(mount, nullptr);
  EXPECT_EQ(mount->device, "254:0");
  EXPECT_EQ(mount->file_system, "ext4");
  EXPECT_EQ(mount->source, "/dev/vda");
  EXPECT_EQ(mounts.find(8), nullptr);
  EXPECT_EQ(mounts.find(28), nullptr) << "its line is cut off";
}

}  // namespace
}  // namespace flashpack::internal
