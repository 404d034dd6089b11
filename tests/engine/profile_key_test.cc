#include "engine/tuning/profile_key.h"

#include <gtest/gtest.h>

#include <span>
#include <string_view>

#include "tests/support/mounts.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

void write_text(const std::filesystem::path& path, std::string_view text) {
  std::filesystem::create_directories(path.parent_path());
  testing::write_file(path, std::as_bytes(std::span(text)));
}

TEST(ProfileKeyTest, ADiskIsCalledByItsWorldWideNameElseItsSerialElseWhatTheKernelCallsIt) {
  const testing::TempDir dir;
  const auto block = dir / "vda";
  write_text(block / "size", "2048\n");
  EXPECT_EQ(disk_name(block), "vda, 2048 sectors");
  write_text(block / "serial", "S\x01\xff 5 \n");
  write_text(block / "device" / "model", "Fast Disk      \n");
  EXPECT_EQ(disk_name(block), "S?? 5, Fast Disk, 2048 sectors");
  write_text(block / "device" / "wwid", "naa.5000\n");
  EXPECT_EQ(disk_name(block), "naa.5000, Fast Disk, 2048 sectors");
}

TEST(ProfileKeyTest, WhatWillBeMadeIsWhereItsDirectoryIs) {
  const testing::TempDir dir;
  const ProfileKey here = profile_key(dir.path(), {});
  const ProfileKey later = profile_key(dir / "a" / "b", {});
  EXPECT_EQ(later.storage, here.storage);
  EXPECT_EQ(later.file_system, here.file_system);
  EXPECT_EQ(later.unknown, here.unknown);
  EXPECT_EQ(here.gpu, "");
  EXPECT_NE(here.kernel.find('.'), std::string::npos) << here.kernel;
}

TEST(ProfileKeyTest, AFileSystemIsOnTheNetworkIfItsSourceNamesAHost) {
  const auto from = [](const char* source) {
    return is_on_network({.device = "0:99", .point = "/m", .file_system = "any", .source = source});
  };
  for (const char* source : {"host:/x", "10.0.0.1:/", "[fe80::1]:/x", "//host/x", "a,b:6789:/"})
    EXPECT_TRUE(from(source)) << source;
  for (const char* source : {"/dev/vda1", "/dev/mapper/a-b", "tmpfs", "none", "", "/"})
    EXPECT_FALSE(from(source)) << source;
}

TEST(ProfileKeyTest, AFileSystemOfAServerThatItsSourceDoesNotNameIsKnownByItsType) {
  const auto on_network = [](const char* type, const char* source) {
    return is_on_network({.device = "0:99", .point = "/m", .file_system = type, .source = source});
  };
  EXPECT_TRUE(on_network("virtiofs", "models"));
  EXPECT_TRUE(on_network("ceph", "user@0a1b2c.models=/"));
  EXPECT_TRUE(on_network("gpfs", "fs1"));
  EXPECT_TRUE(on_network("wekafs", "backend/default"));
  // The same source for any of them, or one whose reads may come from this machine's memory.
  for (const char* type : {"overlay", "tmpfs", "beegfs", "fuse.mergerfs", "zfs", "9p"})
    EXPECT_FALSE(on_network(type, "models")) << type;
}

TEST(ProfileKeyTest, AServersFileSystemIsRecognisedByItsSource) {
  const testing::TempDir dir;
  EXPECT_FALSE(profile_key(dir.path(), {}).on_network);
  const testing::Mount mount("tmpfs", "host:/x", dir / "mount", 0, "");
  if (!mount.refusal().empty()) GTEST_SKIP() << mount.refusal();
  const ProfileKey key = profile_key(dir / "mount", {});
  EXPECT_EQ(key.storage, "host:/x");
  EXPECT_TRUE(key.on_network);
  EXPECT_EQ(key.unknown, "");
}

TEST(ProfileKeyTest, MemoryCannotBeRecognisedAnotherTimeAndSaysSo) {
  EXPECT_NE(profile_key("/proc/self/status", {}).unknown.find("proc has no disk"), std::string::npos);
  testing::write_file("/dev/shm/flashpack_profile_key_test", {});
  EXPECT_NE(profile_key("/dev/shm/flashpack_profile_key_test", {}).unknown.find("tmpfs has no disk"),
            std::string::npos);
  std::filesystem::remove("/dev/shm/flashpack_profile_key_test");
}

}  // namespace
}  // namespace flashpack::internal
