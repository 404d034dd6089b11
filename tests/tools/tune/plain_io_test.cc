#include "tools/tune/plain_io.h"

#include <gtest/gtest.h>
#include <sys/syscall.h>

#include <cerrno>
#include <filesystem>
#include <iterator>
#include <system_error>

#include "bench/support/page_cache.h"
#include "tests/support/lies_in_memory.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack::bench {
namespace {

using testing::kMiB;

TEST(PlainIo, TheDiskIsReadAlsoWhereIoUringIsRefusedAndStaysOutOfThePageCache) {
  const testing::TempDir dir;
  Subject subject(dir / "file", 8 * kMiB, {}, false);
  if (testing::lies_in_memory(subject.checkpoint.path())) GTEST_SKIP() << "this file system keeps its pages";
  drop_from_page_cache(subject.checkpoint.path());
  EXPECT_GT(plain_reads_gb_per_s(subject, kUsual, {}), 0);
  const int status = testing::run_in_child([&] {
    if (!testing::deny_syscall(SYS_io_uring_setup, EPERM)) return testing::kSkip;
    return plain_reads_gb_per_s(subject, kUsual, {}) > 0 ? 0 : 1;
  });
  EXPECT_LT(resident_fraction(subject.checkpoint.path()), 0.5);
  if (status == testing::kSkip) GTEST_SKIP() << "io_uring cannot be refused here";
  EXPECT_EQ(status, 0);
}

TEST(PlainIo, WritesLeaveNoFile) {
  const testing::TempDir dir;
  Subject subject(dir / "file", 8 * kMiB, {}, false);
  EXPECT_GT(plain_writes_gb_per_s(subject, {}), 0);
  using Entries = std::filesystem::directory_iterator;
  EXPECT_EQ(std::distance(Entries(dir.path()), Entries()), 1);
}

TEST(PlainIo, AFileThatCannotBeReadIsAnError) {
  const testing::TempDir dir;
  Subject subject(dir / "file", 8 * kMiB, {}, false);
  std::filesystem::resize_file(subject.checkpoint.path(), kMiB);
  EXPECT_THROW(plain_reads_gb_per_s(subject, kUsual, {}), std::system_error);
}

}  // namespace
}  // namespace flashpack::bench
