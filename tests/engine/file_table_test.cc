#include "engine/file_table.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

class FileTableTest : public ::testing::Test {
 protected:
  FileTableTest() { flashpack::testing::write_file(path_, bytes_); }

  flashpack::testing::TempDir dir_;
  const std::filesystem::path path_ = dir_ / "file";
  const std::vector<std::byte> bytes_ = flashpack::testing::random_bytes(5000);
  FileTable files_{nullptr};
};

TEST_F(FileTableTest, LoadsOfOneFileShareItWhileItIsOpenAndTheSame) {
  auto first = files_.open(path_, std::nullopt, true);
  EXPECT_EQ(files_.open(path_, std::nullopt, true), first);
  EXPECT_EQ(files_.open(path_, std::nullopt, false), first) << "what can do more serves as well";
  EXPECT_NE(files_.open(path_, std::nullopt, true, UniqueFd(::open(path_.c_str(), O_RDONLY | O_CLOEXEC))), first)
      << "the caller knows best which file it is";
  flashpack::testing::write_file(dir_ / "new", bytes_);
  std::filesystem::rename(dir_ / "new", path_);
  EXPECT_NE(files_.open(path_, std::nullopt, true), first);
}

TEST_F(FileTableTest, AFileThatMayNotBeReadAnyMoreIsRefusedThoughItIsOpen) {
  const int status = flashpack::testing::run_in_child([] {
    if (::geteuid() == 0 && ::setresuid(65534, 65534, 65534) != 0) return flashpack::testing::kSkip;
    const flashpack::testing::TempDir own;
    flashpack::testing::write_file(own / "file", {});
    FileTable files(nullptr);
    const auto open = files.open(own / "file", std::nullopt, true);
    ::chmod((own / "file").c_str(), 0);
    try {
      files.open(own / "file", std::nullopt, true);
      return 1;
    } catch (const Error& error) {
      return error.code() == std::errc::permission_denied ? 0 : 2;
    }
  });
  if (status == flashpack::testing::kSkip) GTEST_SKIP() << "root cannot become somebody else here";
  EXPECT_EQ(status, 0);
}

TEST_F(FileTableTest, TheLastUserOfAFileIsTheOneWhoHasItClosed) {
  FileUse first = files_.open(path_, std::nullopt, false);
  FileUse second = first;
  const int fd = first->file.buffered_fd();
  FileUse moved = std::move(first);
  EXPECT_EQ(first.leave(), nullptr) << "what was moved away is no use";
  EXPECT_EQ(moved.leave(), nullptr);
  std::unique_ptr<OpenFile> last = second.leave();
  ASSERT_NE(last, nullptr);
  EXPECT_GE(::fcntl(fd, F_GETFD), 0) << "leaving closes nothing, because that may block";
  last.reset();
  EXPECT_LT(::fcntl(fd, F_GETFD), 0);
}

TEST_F(FileTableTest, AFileThatIsAboutToBeClosedIsNotShared) {
  FileUse first = files_.open(path_, std::nullopt, false);
  std::unique_ptr<OpenFile> last = first.leave();
  const FileUse again = files_.open(path_, std::nullopt, false);
  ASSERT_TRUE(again);
  EXPECT_NE(again.get(), last.get());
  last.reset();
  std::byte byte{};
  EXPECT_EQ(::pread(again->file.buffered_fd(), &byte, 1, 0), 1);
}

TEST_F(FileTableTest, TheEndOfAFileThatWasReplacedLeavesTheNewOneShared) {
  FileUse replaced = files_.open(path_, std::nullopt, true);
  flashpack::testing::write_file(dir_ / "new", bytes_);
  std::filesystem::rename(dir_ / "new", path_);
  const FileUse current = files_.open(path_, std::nullopt, true);
  replaced = {};
  EXPECT_EQ(files_.open(path_, std::nullopt, true), current);
}

TEST_F(FileTableTest, AHandleAndEachOfItsCopiesKeepTheFileOpen) {
  FileHandle handle = FileUse::handle(files_.open(path_, std::nullopt, false));
  const int fd = FileUse::of(handle)->file.buffered_fd();
  FileHandle copy = handle;
  FileHandle moved = std::move(handle);
  EXPECT_FALSE(handle.valid());
  EXPECT_FALSE(FileUse::of(handle));
  moved = FileHandle();
  EXPECT_GE(::fcntl(fd, F_GETFD), 0);
  copy = static_cast<const FileHandle&>(copy);
  EXPECT_GE(::fcntl(fd, F_GETFD), 0);
  FileUse load = FileUse::of(copy);
  copy = FileHandle();
  EXPECT_GE(::fcntl(fd, F_GETFD), 0) << "a load through it is under way";
  EXPECT_NE(load.leave(), nullptr) << "nobody else is left";
}

// Under ThreadSanitizer, this also finds a file that is joined while its last user leaves.
TEST_F(FileTableTest, ThreadsThatOpenAndLeaveOneFileAlwaysHaveItOpen) {
  std::atomic<int> unreadable = 0;
  std::vector<std::jthread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&] {
      for (int i = 0; i < 1000; ++i) {
        FileUse use = files_.open(path_, std::nullopt, false);
        std::byte byte{};
        if (::pread(use->file.buffered_fd(), &byte, 1, 0) != 1) ++unreadable;
        const std::unique_ptr<OpenFile> last = use.leave();
      }
    });
  }
  threads.clear();
  EXPECT_EQ(unreadable, 0);
}

TEST_F(FileTableTest, AFileThatWasOpenedForBufferedReadsDoesNotServeDirectOnes) {
  auto buffered = files_.open(path_, std::nullopt, false);
  EXPECT_NE(files_.open(path_, std::nullopt, true), buffered);
}

TEST_F(FileTableTest, AnotherFileThanExpectedIsRefusedThoughItIsOpen) {
  const auto open = files_.open(path_, std::nullopt, true);
  FileIdentity other = open->file.identity();
  ++other.mtime_ns;
  EXPECT_THROW(files_.open(path_, other, true), Error);
}

}  // namespace
}  // namespace flashpack::internal
