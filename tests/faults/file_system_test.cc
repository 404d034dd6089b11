// Loads from file systems that are not a plain disk.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>

#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/mounts.h"
#include "tests/support/run.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

using testing::GuardedMemory;
using testing::kMiB;

class FileSystemTest : public ::testing::TestWithParam<Backend> {
 protected:
  // Every policy and phase, cold and cached. Gives the stats of the last load by kAuto.
  TransferStats load_in_every_way(const std::filesystem::path& path) {
    TransferStats stats;
    for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered, CachePolicy::kAuto}) {
      for (const std::size_t phase : {0u, 64u}) {
        for (const bool cold : {true, false}) {
          if (cold) testing::drop_from_cache(path);
          GuardedMemory memory(bytes_.size(), phase);
          stats =
              engine_.load({.files = {{.path = path, .extents = {{0, memory.size(), memory.data()}}}}, .cache = cache});
          EXPECT_TRUE(memory.intact());
          EXPECT_TRUE(testing::same_bytes(memory.data(), bytes_.data(), memory.size()));
          EXPECT_GE(stats.direct_bytes + stats.buffered_bytes, bytes_.size());
        }
      }
    }
    return stats;
  }

  testing::TempDir dir_;
  std::vector<std::byte> bytes_ = testing::random_bytes(5 * kMiB + 777);
  Engine engine_{{.chunk_bytes = kMiB, .staging_bytes = 4 * kMiB, .workers = 2, .backend = GetParam()}};
};

INSTANTIATE_TEST_SUITE_P(Backends, FileSystemTest, ::testing::Values(Backend::kAuto, Backend::kWorkers),
                         [](const auto& backend) { return backend.param == Backend::kAuto ? "Auto" : "Workers"; });

TEST_P(FileSystemTest, Tmpfs) {
  const testing::Mount mount("tmpfs", "tmpfs", dir_ / "tmpfs", 0, "size=32m");
  if (!mount.refusal().empty()) GTEST_SKIP() << mount.refusal();
  testing::write_file(dir_ / "tmpfs/file", bytes_);
  const TransferStats stats = load_in_every_way(dir_ / "tmpfs/file");
  EXPECT_EQ(stats.direct_bytes, 0u) << "all of it is in memory: " << stats.fallback_reason;
}

TEST_P(FileSystemTest, Overlayfs) {
  for (const char* layer : {"lower", "upper", "work"}) std::filesystem::create_directories(dir_ / layer);
  testing::write_file(dir_ / "lower/file", bytes_);
  const std::string layers = "lowerdir=" + (dir_ / "lower").string() + ",upperdir=" + (dir_ / "upper").string() +
                             ",workdir=" + (dir_ / "work").string();
  const testing::Mount mount("overlay", "overlay", dir_ / "overlay", 0, layers);
  if (!mount.refusal().empty()) GTEST_SKIP() << mount.refusal();
  load_in_every_way(dir_ / "overlay/file");
  testing::write_file(dir_ / "overlay/new", bytes_);
  load_in_every_way(dir_ / "overlay/new");
}

// The disk ends in the middle of the file: an error of the block layer, not of the file system.
TEST_P(FileSystemTest, ADiskThatFailsIsAnErrorWithPathAndOffset) {
  const std::string disk = dir_ / "disk";
  const std::string at = dir_ / "mounted";
  std::filesystem::create_directories(at);
  const auto made = testing::run("truncate -s 64M " + disk + " && mkfs.ext4 -q -O ^has_journal " + disk +
                                 " 2>&1 && mount -o loop " + disk + " " + at + " 2>&1");
  if (made.status != 0) GTEST_SKIP() << "no loop device: " << made.output;
  const auto path = std::filesystem::path(at) / "file";
  testing::write_file(path, testing::random_bytes(40 * kMiB));
  testing::run("umount " + at + " && mount -o loop,ro " + disk + " " + at);
  std::filesystem::resize_file(disk, 24 * kMiB);
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered, CachePolicy::kAuto}) {
    testing::drop_from_cache(path);
    GuardedMemory memory(40 * kMiB);
    try {
      engine_.load({.files = {{.path = path, .extents = {{0, memory.size(), memory.data()}}}}, .cache = cache});
      ADD_FAILURE() << "the second half of the disk is gone";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), std::errc::io_error) << error.what();
      EXPECT_EQ(error.path(), path);
      EXPECT_LT(error.offset_bytes(), 40 * kMiB);
    }
    EXPECT_TRUE(memory.intact());
  }
  testing::run("umount -l " + at);
}

}  // namespace
}  // namespace flashpack
