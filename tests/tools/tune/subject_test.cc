#include "tools/tune/subject.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <fstream>
#include <optional>
#include <string>
#include <utility>

#include "bench/support/page_cache.h"
#include "tests/support/lies_in_memory.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack::bench {
namespace {

using testing::kMiB;

TEST(Subject, AnEngineGetsAllOptionsOfASettingAndRoomForItsReads) {
  const EngineOptions options =
      options_of({16 * kMiB, 32, 3, 0, Backend::kWorkers}, {.kind = Device::Kind::kCuda, .index = 1});
  EXPECT_EQ(options.chunk_bytes, 16 * kMiB);
  EXPECT_EQ(options.queue_depth, 32U);
  EXPECT_EQ(options.workers, 3U);
  EXPECT_EQ(options.staging_bytes, 512 * kMiB);
  EXPECT_EQ(options.backend, Backend::kWorkers);
  EXPECT_EQ(options.device.index, 1);
  EXPECT_EQ(options_of({kMiB, 8, 0, 24 * kMiB}, {}).staging_bytes, 24 * kMiB);
}

TEST(Subject, ALoadWithAPolicyBeginsWithNothingCachedAndGoesTheWayOfThePolicy) {
  const testing::TempDir dir;
  Subject subject(dir / "file", 8 * kMiB, {}, false);
  const auto& path = subject.checkpoint.path();
  if (testing::lies_in_memory(path)) GTEST_SKIP() << "this file system keeps its pages";
  for (const auto& [policy, resident] : {std::pair{CachePolicy::kBuffered, true}, {CachePolicy::kDirect, false}}) {
    sample_policy(subject, kUsual, policy, Cached::kNothing);
    EXPECT_EQ(resident_fraction(path) > 0.5, resident);
  }
  warm_page_cache(path);
  sample_policy(subject, kUsual, CachePolicy::kDirect, Cached::kWhole);
  EXPECT_GT(resident_fraction(path), 0.5);  // A kernel that is short of memory may take some pages.
}

// Empty where the kernel does not count them.
std::optional<std::uint64_t> bytes_read_by_this_process() {
  std::ifstream io("/proc/self/io");
  for (std::string name; io >> name;) {
    std::uint64_t value = 0;
    if (io >> value && name == "read_bytes:") return value;
  }
  return std::nullopt;
}

TEST(Subject, ASlowDiskIsNotReadWholeToFindOutHowMuchOfTheFileASampleReads) {
  const testing::TempDir dir;
  Subject subject(dir / "file", 256 * kMiB, {}, false);
  if (testing::lies_in_memory(subject.checkpoint.path())) GTEST_SKIP() << "this file system keeps its pages";
  const auto before = bytes_read_by_this_process();
  if (!before) GTEST_SKIP() << "this kernel does not count what a process reads";
  fit(subject, Work::kDisk, 0);
  EXPECT_EQ(subject.sample_bytes(Work::kDisk), 64 * kMiB);
  EXPECT_LT(bytes_read_by_this_process().value() - *before, 192 * kMiB);
}

TEST(Subject, ASampleReadsLittleThatItDoesNotMeasure) {
  const testing::TempDir dir;
  Subject subject(dir / "file", 256 * kMiB, {}, false);
  if (testing::lies_in_memory(subject.checkpoint.path())) GTEST_SKIP() << "this file system keeps its pages";
  drop_from_page_cache(subject.checkpoint.path());
  fit(subject, Work::kDisk, 0);
  const auto before = bytes_read_by_this_process();
  if (!before) GTEST_SKIP() << "this kernel does not count what a process reads";
  sample(subject, kUsual, Work::kDisk);
  sample_policy(subject, kUsual, CachePolicy::kDirect, Cached::kNothing);
  const std::uint64_t read_bytes = bytes_read_by_this_process().value() - *before;
  EXPECT_GE(read_bytes, 2 * 64 * kMiB);
  EXPECT_LE(read_bytes, 2 * (64 + 32) * kMiB);  // Pages of programs that memory was taken from are counted, too.
}

TEST(Subject, ASampleOfAFastDiskIsTheWholeFile) {
  const testing::TempDir dir;
  Subject subject(dir / "file", 256 * kMiB, {}, false);
  const std::uint64_t whole_bytes = subject.sample_bytes(Work::kDisk);
  fit(subject, Work::kDisk, 1e6);
  EXPECT_EQ(subject.sample_bytes(Work::kDisk), whole_bytes);
}

}  // namespace
}  // namespace flashpack::bench
