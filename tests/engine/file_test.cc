#include "engine/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <array>
#include <vector>

#include "engine/plan.h"
#include "flashpack/error.h"
#include "tests/support/lease_holder.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

using flashpack::testing::TempDir;

class FileTest : public ::testing::Test {
 protected:
  FileTest() { flashpack::testing::write_file(path_, bytes_); }

  TempDir dir_;
  std::filesystem::path path_ = dir_ / "file";
  std::vector<std::byte> bytes_ = flashpack::testing::random_bytes(3 * 4096 + 5);
};

TEST_F(FileTest, BlocksAreAtLeastAPageAndAPowerOfTwo) {
  const File file = File::open(path_, std::nullopt, true);
  EXPECT_GE(file.alignment().block_bytes, kPageBytes);
  EXPECT_TRUE(std::has_single_bit(file.alignment().block_bytes));
  EXPECT_EQ(file.identity().size_bytes, bytes_.size());
}

TEST_F(FileTest, DirectIsOpenedOnlyWhenWanted) { EXPECT_EQ(File::open(path_, std::nullopt, false).direct_fd(), -1); }

TEST_F(FileTest, TheReasonForNoDirectIoIsTheChangeOfTheFileAndNotTheFileSystem) {
  if (File::open(path_, std::nullopt, true).direct_fd() < 0) GTEST_SKIP() << "no direct I/O here";
  File changed = File::open(path_, std::nullopt, false);
  flashpack::testing::write_file(path_, std::span(bytes_).first(100));
  changed.open_direct();
  EXPECT_EQ(changed.direct_fd(), -1);
  EXPECT_EQ(changed.direct_error(), Errc::kFileChanged);
}

TEST_F(FileTest, ADescriptorThatCannotBeReadIsRefused) {
  for (const int flags : {O_WRONLY, O_PATH}) {
    try {
      File::open(path_, std::nullopt, false, UniqueFd(::open(path_.c_str(), flags | O_CLOEXEC)));
      ADD_FAILURE() << flags;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), std::errc::bad_file_descriptor);
    }
  }
}

TEST_F(FileTest, AFileWithoutDirectIoIsStillOpened) {
  const File file = File::open("/proc/self/status", std::nullopt, true);
  EXPECT_EQ(file.direct_fd(), -1);
  EXPECT_GE(file.buffered_fd(), 0);
}

TEST_F(FileTest, WritingInPlaceIsAChangeAndARenameOverItIsNot) {
  const File file = File::open(path_, std::nullopt, true);
  EXPECT_EQ(file.check_unchanged(), std::error_code());
  flashpack::testing::write_file(dir_ / "new", bytes_);
  std::filesystem::rename(dir_ / "new", path_);
  EXPECT_EQ(file.check_unchanged(), std::error_code());

  const File again = File::open(path_, std::nullopt, true);
  flashpack::testing::write_file(path_, std::span(bytes_).first(100));
  EXPECT_EQ(again.check_unchanged(), Errc::kFileChanged);
}

TEST_F(FileTest, ATimeTooFarAwayForNanosecondsIsStillAnIdentity) {
  const auto set_time = [this](time_t seconds) {
    const std::array<timespec, 2> times{{{.tv_sec = seconds}, {.tv_sec = seconds, .tv_nsec = 5}}};
    ASSERT_EQ(::utimensat(AT_FDCWD, path_.c_str(), times.data(), 0), 0);
  };
  constexpr time_t kYear2286 = 10'000'000'000;
  set_time(kYear2286);
  struct stat status{};
  ASSERT_EQ(::stat(path_.c_str(), &status), 0);
  if (status.st_mtim.tv_sec != kYear2286) GTEST_SKIP() << "this file system has no such time";
  const File file = File::open(path_, std::nullopt, false);
  EXPECT_EQ(file.check_unchanged(), std::error_code());
  EXPECT_EQ(static_cast<std::uint64_t>(file.identity().mtime_ns), std::uint64_t{kYear2286} * 1'000'000'000 + 5);
  set_time(kYear2286 + 1);
  EXPECT_EQ(file.check_unchanged(), Errc::kFileChanged);
}

TEST_F(FileTest, AFileWithAWriteLeaseIsWaitedForAsOpenDoes) {
  const flashpack::testing::LeaseHolder holder(path_);
  if (!holder.holds()) GTEST_SKIP() << "no leases on this file system";
  EXPECT_EQ(File::open(path_, std::nullopt, true).identity().size_bytes, bytes_.size());
}

TEST_F(FileTest, AFifoIsAnErrorAndNotWaitedFor) {
  const auto fifo = dir_ / "fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_THROW(File::open(fifo, std::nullopt, true), Error);
}

}  // namespace
}  // namespace flashpack::internal
