#include "flashpack/file_writer.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/sandbox.h"
#include "tests/support/sanitizers.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

using testing::kMiB;
using testing::TempDir;

std::span<const std::byte> bytes_of(const char* text) { return std::as_bytes(std::span(text, std::strlen(text))); }

class FileWriterTest : public ::testing::Test {
 protected:
  std::size_t entries() const {
    return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(dir_.path()), {}));
  }

  TempDir dir_;
  std::filesystem::path path_ = dir_ / "model";
  std::vector<std::byte> bytes_ = testing::random_bytes(3 * kMiB + 99);
  Engine engine_{{.chunk_bytes = kMiB, .staging_bytes = 2 * kMiB, .workers = 2}};
};

TEST_F(FileWriterTest, PayloadGapsAndTailAreWhereTheyBelong) {
  FileWriter writer = engine_.create(path_, {.payload_bytes = 5 * kMiB + 300});
  Transfer late =
      writer.start_write({.extents = {{.offset_bytes = 5 * kMiB, .size_bytes = 100, .source = bytes_.data()}}});
  writer.write({.extents = {{.offset_bytes = 7, .size_bytes = bytes_.size(), .source = bytes_.data()}}});
  late.wait();
  EXPECT_FALSE(std::filesystem::exists(path_));
  writer.commit(bytes_of("tail"));
  std::vector<std::byte> expected(5 * kMiB + 300);
  std::copy(bytes_.begin(), bytes_.end(), expected.begin() + 7);
  std::copy_n(bytes_.begin(), 100, expected.begin() + 5 * kMiB);
  for (const std::byte byte : bytes_of("tail")) expected.push_back(byte);
  EXPECT_TRUE(testing::file_has(path_, expected));
  EXPECT_EQ(entries(), 1u);
}

TEST_F(FileWriterTest, ExtentsPastTheAnnouncedPayloadPushTheTailBack) {
  FileWriter writer = engine_.create(path_, {.payload_bytes = 5});
  writer.write({.extents = {{.offset_bytes = 0, .size_bytes = 10, .source = bytes_.data()}}});
  writer.commit(bytes_of("tail"));
  EXPECT_EQ(std::filesystem::file_size(path_), 14u);
}

TEST_F(FileWriterTest, ABareNameIsAFileInTheWorkingDirectoryOfItsCreation) {
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(dir_.path());
  FileWriter writer = engine_.create("bare");
  std::filesystem::current_path(before);
  writer.commit(bytes_of("tail"));
  EXPECT_TRUE(std::filesystem::exists(dir_ / "bare"));
}

TEST_F(FileWriterTest, WithoutCommitTheOldFileStaysAndNothingIsLeft) {
  testing::write_file(path_, bytes_of("old"));
  {
    FileWriter writer = engine_.create(path_);
    writer.write({.extents = {{.offset_bytes = 0, .size_bytes = bytes_.size(), .source = bytes_.data()}}});
    engine_.create(dir_ / "other")
        .start_write({.extents = {{.offset_bytes = 0, .size_bytes = 9, .source = bytes_.data()}}})
        .detach();
  }
  EXPECT_EQ(testing::read_file(path_), std::vector(bytes_of("old").begin(), bytes_of("old").end()));
  EXPECT_EQ(entries(), 1u);
}

TEST_F(FileWriterTest, ReplacesAtomicallyAndKeepsTheMode) {
  testing::write_file(path_, bytes_of("old"));
  ASSERT_EQ(::chmod(path_.c_str(), 0640), 0);
  FileWriter writer = engine_.create(path_);
  writer.write({.extents = {{.offset_bytes = 0, .size_bytes = 10, .source = bytes_.data()}}});
  writer.commit();
  struct stat status{};
  ASSERT_EQ(::stat(path_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0640u);
  EXPECT_EQ(status.st_size, 10);
}

TEST_F(FileWriterTest, APathWithoutADirectoryIsInTheWorkingDirectory) {
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(dir_.path());
  FileWriter writer = engine_.create("model");
  EXPECT_NO_THROW(writer.commit(bytes_of("tail")));
  std::filesystem::current_path(before);
  EXPECT_EQ(std::filesystem::file_size(path_), 4u);
}

TEST_F(FileWriterTest, NewFilesObeyTheUmask) {
  const mode_t old = ::umask(027);
  FileWriter writer = engine_.create(path_);
  writer.commit(bytes_of("x"));
  ::umask(old);
  struct stat status{};
  ASSERT_EQ(::stat(path_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0640u);
}

TEST_F(FileWriterTest, SymbolicLinksKeepPointingToTheFileThatIsReplaced) {
  testing::write_file(dir_ / "real", bytes_of("old"));
  std::filesystem::create_symlink("real", path_);
  FileWriter writer = engine_.create(path_);
  writer.commit(bytes_of("new"));
  EXPECT_TRUE(std::filesystem::is_symlink(path_));
  EXPECT_EQ(std::filesystem::file_size(dir_ / "real"), 3u);
  EXPECT_EQ(testing::read_file(dir_ / "real"), std::vector(bytes_of("new").begin(), bytes_of("new").end()));
}

TEST_F(FileWriterTest, ALinkToWhatIsNotThereYetIsAWayToCreateIt) {
  std::filesystem::create_symlink("real", path_);
  engine_.create(path_).commit(bytes_of("new"));
  EXPECT_TRUE(std::filesystem::is_symlink(path_));
  EXPECT_EQ(std::filesystem::file_size(dir_ / "real"), 3u);
}

TEST_F(FileWriterTest, ALinkThatIsNotToBeFollowedIsReplacedByAFileWithTheModeOfItsFile) {
  testing::write_file(dir_ / "real", bytes_of("old"));
  ASSERT_EQ(::chmod((dir_ / "real").c_str(), 0640), 0);
  std::filesystem::create_symlink("real", path_);
  engine_.create(path_, {.follow_links = false}).commit(bytes_of("new one"));
  struct stat status{};
  ASSERT_EQ(::lstat(path_.c_str(), &status), 0);
  EXPECT_TRUE(S_ISREG(status.st_mode));
  EXPECT_EQ(status.st_mode & 0777, 0640u);
  EXPECT_EQ(status.st_size, 7);
  EXPECT_EQ(testing::read_file(dir_ / "real"), std::vector(bytes_of("old").begin(), bytes_of("old").end()));
}

TEST_F(FileWriterTest, ALinkToNothingThatIsNotToBeFollowedIsReplaced) {
  std::filesystem::create_symlink("absent", path_);
  engine_.create(path_, {.follow_links = false}).commit(bytes_of("new"));
  EXPECT_FALSE(std::filesystem::is_symlink(path_));
  EXPECT_EQ(entries(), 1u);
}

TEST_F(FileWriterTest, ALinkToADirectoryIsNoFileToReplace) {
  std::filesystem::create_directory_symlink(dir_.path(), path_);
  EXPECT_THROW(engine_.create(path_, {.follow_links = false}), Error);
  EXPECT_TRUE(std::filesystem::is_symlink(path_));
}

TEST_F(FileWriterTest, ABareNameThatIsNotToBeFollowedStaysWhereItWasCreated) {
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(dir_.path());
  FileWriter writer = engine_.create("bare", {.follow_links = false});
  std::filesystem::current_path(before);
  writer.commit(bytes_of("tail"));
  EXPECT_TRUE(std::filesystem::exists(dir_ / "bare"));
}

TEST_F(FileWriterTest, OtherNamesOfTheFileThatIsReplacedKeepTheOldOne) {
  testing::write_file(path_, bytes_of("old"));
  std::filesystem::create_hard_link(path_, dir_ / "other name");
  engine_.create(path_).commit(bytes_of("newer"));
  EXPECT_EQ(std::filesystem::file_size(path_), 5u);
  EXPECT_EQ(std::filesystem::file_size(dir_ / "other name"), 3u);
}

TEST_F(FileWriterTest, ACancelledWriteFailsTheCommitAndTheOldFileStays) {
  testing::write_file(path_, bytes_of("old"));
  const std::vector<std::byte> much(64 * kMiB);
  // Now and then all is written before the cancel is seen.
  for (int attempt = 0; attempt < 100; ++attempt) {
    FileWriter writer = engine_.create(path_);
    Transfer transfer =
        writer.start_write({.extents = {{.offset_bytes = 0, .size_bytes = much.size(), .source = much.data()}}});
    transfer.cancel();
    try {
      transfer.wait();
      continue;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kCancelled);
    }
    try {
      writer.commit(bytes_of("tail"));
      FAIL();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kCancelled);
      EXPECT_EQ(error.path(), path_);
    }
    EXPECT_EQ(std::filesystem::file_size(path_), 3u);
    EXPECT_EQ(entries(), 1u);
    return;
  }
  FAIL() << "a hundred writes outran their cancel";
}

TEST_F(FileWriterTest, ACancelAfterTheCommitChangesNothing) {
  FileWriter writer = engine_.create(path_);
  Transfer transfer =
      writer.start_write({.extents = {{.offset_bytes = 0, .size_bytes = bytes_.size(), .source = bytes_.data()}}});
  transfer.wait();
  writer.commit();
  transfer.cancel();
  EXPECT_EQ(transfer.wait().requested_bytes, bytes_.size());
  EXPECT_TRUE(testing::file_has(path_, bytes_));
}

TEST_F(FileWriterTest, MissingDirectoryAndDirectoryTargetNameThePath) {
  try {
    (void)engine_.create(dir_ / "none" / "model");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), std::errc::no_such_file_or_directory);
    EXPECT_EQ(error.path(), dir_ / "none" / "model");
  }
  try {
    (void)engine_.create(dir_.path());
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), std::errc::is_a_directory);
  }
}

TEST_F(FileWriterTest, AWriteThatFailedFailsTheCommit) {
  FileWriter writer = engine_.create(path_);
  Transfer transfer = writer.start_write(
      {.extents = {{.offset_bytes = 0, .size_bytes = 100, .source = reinterpret_cast<const void*>(16)}}});
  EXPECT_THROW(transfer.wait(), Error);  // EFAULT: no such memory.
  EXPECT_THROW(writer.commit(), Error);
  EXPECT_EQ(entries(), 0u);
}

TEST_F(FileWriterTest, AWriteEndsAtItsDeadlineAndOneBeforeItIsWhole) {
  FileWriter writer = engine_.create(path_);
  WriteRequest request{.extents = {{.offset_bytes = 0, .size_bytes = bytes_.size(), .source = bytes_.data()}}};
  request.deadline = std::chrono::steady_clock::now() + std::chrono::hours(1);
  writer.write(request);
  writer.commit();
  EXPECT_TRUE(testing::file_has(path_, bytes_));

  FileWriter late = engine_.create(path_);
  request.deadline = std::chrono::steady_clock::now();
  Transfer transfer = late.start_write(request);
  EXPECT_THROW(transfer.wait(), Error);
  EXPECT_EQ(transfer.error(), Errc::kDeadlineExceeded);
  EXPECT_THROW(late.commit(), Error);
  EXPECT_TRUE(testing::file_has(path_, bytes_)) << "the old file is as it was";
}

TEST_F(FileWriterTest, ARefusedWriteDoesNotMoveTheTail) {
  FileWriter writer = engine_.create(path_);
  EXPECT_THROW((void)writer.start_write({.extents = {{.offset_bytes = 5000, .size_bytes = 10, .source = bytes_.data()},
                                                     {.offset_bytes = 0, .size_bytes = 10, .source = nullptr}}}),
               Error);
  EXPECT_THROW(
      (void)writer.start_write(
          {.extents = {{.offset_bytes = ~std::uint64_t{0} - 2000, .size_bytes = 1000, .source = bytes_.data()}}}),
      Error);
  writer.write({.extents = {{.offset_bytes = 0, .size_bytes = 10, .source = bytes_.data()}}});
  writer.commit(bytes_of("tail"));
  EXPECT_EQ(std::filesystem::file_size(path_), 14u);
}

// Commits on another thread while the completion is still running on the driver's.
struct CommitElsewhere final : Completion {
  void done(Transfer&) noexcept override {
    std::thread([this] { writer->commit(); }).join();
  }
  FileWriter* writer = nullptr;
};

TEST_F(FileWriterTest, ACompletionMayLeadToTheCommitOnAnotherThread) {
  FileWriter writer = engine_.create(path_);
  CommitElsewhere completion;
  completion.writer = &writer;
  Transfer transfer =
      writer.start_write({.extents = {{.offset_bytes = 0, .size_bytes = 10, .source = bytes_.data()}}}, &completion);
  transfer.wait();
  EXPECT_EQ(std::filesystem::file_size(path_), 10u);
}

TEST_F(FileWriterTest, AForkedChildThatDestroysItsCopyLeavesTheFileToItsParent) {
  if (testing::kSanitizer)
    GTEST_SKIP() << "the sanitizers' locks may be held by a thread that the forked child does not have";
  FileWriter writer = engine_.create(path_);
  writer.write({.extents = {{.offset_bytes = 0, .size_bytes = bytes_.size(), .source = bytes_.data()}}});
  const int status = testing::run_in_child([&] {
    const FileWriter copy = std::move(writer);
    return 0;
  });
  EXPECT_EQ(status, 0);
  EXPECT_NO_THROW(writer.commit());
  EXPECT_TRUE(testing::file_has(path_, bytes_));
}

TEST_F(FileWriterTest, NamesUpToTheLimitOfTheFileSystemCanBeWritten) {
  const auto longest = dir_ / std::string(255, 'n');
  engine_.create(longest).commit(bytes_of("x"));
  EXPECT_EQ(std::filesystem::file_size(longest), 1u);
}

TEST_F(FileWriterTest, AfterTheCommitEveryCallIsAnErrorThatNamesTheFile) {
  FileWriter writer = engine_.create(path_);
  writer.commit(bytes_of("x"));
  for (const auto& call :
       {std::function<void()>([&] { writer.commit(); }), std::function<void()>([&] { (void)writer.start_write({}); }),
        std::function<void()>([&] { (void)writer.checksums(); })}) {
    try {
      call();
      FAIL();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kInvalidArgument);
      EXPECT_EQ(error.path(), path_);
    }
  }
}

TEST_F(FileWriterTest, TheSameBytesTwiceAreAnErrorAndNotWritten) {
  FileWriter writer = engine_.create(path_);
  const auto extent = [&](std::uint64_t offset, std::uint64_t size) {
    return SourceExtent{.offset_bytes = offset, .size_bytes = size, .source = bytes_.data()};
  };
  writer.write({.extents = {extent(1000, 1000), extent(2100, 900)}});
  EXPECT_THROW((void)writer.start_write({.extents = {extent(999, 2)}}), Error);
  EXPECT_THROW((void)writer.start_write({.extents = {extent(2050, 10)}}), Error) << "zeros that the first call wrote";
  EXPECT_THROW((void)writer.start_write({.extents = {extent(5000, 10), extent(5009, 10)}}), Error);
  writer.write({.extents = {extent(3000, 100)}});
  writer.write({.extents = {extent(0, 1000)}});
  writer.commit();
  std::vector<std::byte> expected(3100);
  std::copy_n(bytes_.begin(), 1000, expected.begin());
  std::copy_n(bytes_.begin(), 1000, expected.begin() + 1000);
  std::copy_n(bytes_.begin(), 900, expected.begin() + 2100);
  std::copy_n(bytes_.begin(), 100, expected.begin() + 3000);
  EXPECT_TRUE(testing::file_has(path_, expected));
}

class StoreTest : public ::testing::TestWithParam<Backend> {
 protected:
  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "model";
  Engine engine_{{.chunk_bytes = kMiB, .staging_bytes = 3 * kMiB, .workers = 2, .backend = GetParam()}};
};

INSTANTIATE_TEST_SUITE_P(Backends, StoreTest,
                         ::testing::Values(Backend::kAuto, Backend::kPlainIoUring, Backend::kWorkers),
                         [](const auto& backend) {
                           if (backend.param == Backend::kAuto) return "Auto";
                           return backend.param == Backend::kWorkers ? "Workers" : "PlainIoUring";
                         });

TEST_P(StoreTest, AlignedMemoryIsWrittenInPlaceAndOtherMemoryThroughSlots) {
  const auto bytes = testing::random_bytes(5 * kMiB);
  for (const std::size_t phase : {std::size_t{0}, std::size_t{1}}) {
    testing::GuardedMemory memory(bytes.size(), phase);
    std::copy(bytes.begin(), bytes.end(), memory.data());
    FileWriter writer = engine_.create(path_, {.payload_bytes = bytes.size()});
    const TransferStats stats = writer.write({.extents = {{.size_bytes = bytes.size(), .source = memory.data()}}});
    writer.commit();
    EXPECT_TRUE(testing::file_has(path_, bytes));
    if (!stats.fallback_reason.empty()) continue;  // No direct I/O here.
    EXPECT_EQ(stats.direct_bytes, bytes.size());
    EXPECT_EQ(stats.staged_bytes, phase == 0 ? 0 : bytes.size());
  }
}

TEST_P(StoreTest, FilesInAnyOrderFromAnyMemoryAreByteExact) {
  std::mt19937_64 random(3);
  const auto bytes = testing::random_bytes(5 * kMiB);
  for (int round = 0; round < 10; ++round) {
    std::vector<std::byte> expected(bytes.size());
    std::vector<std::vector<SourceExtent>> calls(1 + random() % 4);
    std::vector<std::unique_ptr<testing::GuardedMemory>> sources;
    std::uint64_t at = random() % 3 ? 0 : random() % 10'000;
    std::size_t which = 0;
    while (at < bytes.size()) {
      const bool small = random() % 2;
      const std::uint64_t wanted = small ? 1 + random() % 3000 : 5000 + random() % 2'000'000;
      const std::uint64_t size = std::min<std::uint64_t>(wanted, bytes.size() - at);
      sources.push_back(std::make_unique<testing::GuardedMemory>(size, random() % 2 ? at : random() % 4096));
      std::memcpy(sources.back()->data(), bytes.data() + at, size);
      std::memcpy(expected.data() + at, bytes.data() + at, size);
      calls[which].push_back({at, size, sources.back()->data()});
      // Only after a large one, or what the calls write as zeros would be each other's.
      if (!small) which = random() % calls.size();
      at += size + (random() % 3 ? 0 : 4096 + random() % 5000);
    }
    FileWriter writer = engine_.create(path_, {.payload_bytes = random() % 2 ? bytes.size() : 0});
    std::vector<Transfer> transfers;
    for (auto& call : calls) {
      std::shuffle(call.begin(), call.end(), random);
      transfers.push_back(writer.start_write({.extents = call}));
    }
    for (Transfer& transfer : transfers) transfer.wait();
    writer.commit();
    auto written = testing::read_file(path_);
    ASSERT_LE(written.size(), expected.size());
    written.resize(expected.size());
    ASSERT_TRUE(testing::same_bytes(written.data(), expected.data(), expected.size())) << "round " << round;
  }
}

}  // namespace
}  // namespace flashpack
