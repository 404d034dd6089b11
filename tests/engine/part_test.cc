#include "engine/part.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "tests/support/guarded_memory.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

constexpr std::uint32_t kMiB = 1u << 20;

class PartTest : public ::testing::Test {
 protected:
  PartTest() { flashpack::testing::write_file(path_, bytes_); }

  std::unique_ptr<Part> part(std::vector<Fragment> extents) {
    auto part = std::make_unique<Part>();
    part->path = path_;
    part->extents = std::move(extents);
    return part;
  }

  flashpack::testing::TempDir dir_;
  const std::filesystem::path path_ = dir_ / "file";
  const std::vector<std::byte> bytes_ = flashpack::testing::random_bytes(2 * kMiB);
  FileTable files_{nullptr};
};

TEST_F(PartTest, LoadsOfOneFileShareItWhileItIsOpenAndTheSame) {
  auto first = files_.open(path_, std::nullopt, true);
  EXPECT_EQ(files_.open(path_, std::nullopt, true), first);
  EXPECT_EQ(files_.open(path_, std::nullopt, false), first) << "what can do more serves as well";
  EXPECT_NE(files_.open(path_, std::nullopt, true, UniqueFd(::open(path_.c_str(), O_RDONLY | O_CLOEXEC))), first)
      << "the caller knows best which file it is";
  flashpack::testing::write_file(dir_ / "new", bytes_);
  std::filesystem::rename(dir_ / "new", path_);
  EXPECT_NE(files_.open(path_, std::nullopt, true), first);
}

TEST_F(PartTest, AFileThatMayNotBeReadAnyMoreIsRefusedThoughItIsOpen) {
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

TEST_F(PartTest, AFileThatWasOpenedForBufferedReadsDoesNotServeDirectOnes) {
  auto buffered = files_.open(path_, std::nullopt, false);
  EXPECT_NE(files_.open(path_, std::nullopt, true), buffered);
}

TEST_F(PartTest, AnotherFileThanExpectedIsRefusedThoughItIsOpen) {
  const auto open = files_.open(path_, std::nullopt, true);
  FileIdentity other = open->file.identity();
  ++other.mtime_ns;
  EXPECT_THROW(files_.open(path_, other, true), Error);
}

TEST_F(PartTest, LittleThatIsCachedIsReadWhereTheFileIsOpened) {
  const flashpack::testing::HeldInCache held(path_);
  for (const CachePolicy policy : {CachePolicy::kAuto, CachePolicy::kBuffered}) {
    flashpack::testing::GuardedMemory memory(1000);
    auto wanted = part({{kMiB, 500, memory.data()}, {kMiB + 1000, 500, memory.data() + 500}});
    wanted->cache = policy;
    open_part(*wanted, files_, kMiB, 4096);
    EXPECT_FALSE(wanted->failure);
    EXPECT_TRUE(wanted->checked);
    EXPECT_EQ(wanted->read_bytes, 1000u);
    EXPECT_FALSE(wanted->memory_claimed)
        << "its transfer may end while the thread still looks at the file and closes it";
    EXPECT_EQ(wanted->open, nullptr);
    EXPECT_EQ(std::memcmp(memory.data(), bytes_.data() + kMiB, 500), 0);
    EXPECT_EQ(std::memcmp(memory.data() + 500, bytes_.data() + kMiB + 1000, 500), 0);
    EXPECT_TRUE(memory.intact());
  }
}

TEST_F(PartTest, WhatTheDriverHasClaimedOrIsToBeReadInAnotherWayIsNotReadWhereTheFileIsOpened) {
  const flashpack::testing::HeldInCache held(path_);
  flashpack::testing::GuardedMemory memory(1000);
  std::fill_n(memory.data(), memory.size(), std::byte{});
  const std::vector<std::function<void(Part&)>> ways = {
      [](Part& part) { part.memory_claimed = true; },
      [](Part& part) { part.cache = CachePolicy::kDirect; },
      [](Part& part) { part.extents[0].offset_bytes = kMiB; },  // Too far from the other.
      [](Part& part) { part.extents[1].on_device = true; },
      [](Part& part) { part.checksums = Checksums{.size_bytes = 10, .crc32c = {1}}; },
  };
  for (const auto& way : ways) {
    auto wanted = part({{0, 500, memory.data()}, {500, 500, memory.data() + 500}});
    way(*wanted);
    open_part(*wanted, files_, kMiB, 4096);
    EXPECT_FALSE(wanted->failure);
    EXPECT_FALSE(wanted->checked);
    EXPECT_NE(wanted->open, nullptr);
    EXPECT_EQ(wanted->read_bytes, 0u);
  }
  EXPECT_EQ(std::count(memory.data(), memory.data() + memory.size(), std::byte{}), 1000);
}

TEST_F(PartTest, WhatIsWrongWithTheFileIsKeptForTheTransfer) {
  flashpack::testing::GuardedMemory memory(100);
  auto too_far = part({{2 * kMiB - 50, 100, memory.data()}});
  open_part(*too_far, files_, kMiB);
  ASSERT_TRUE(too_far->failure);
  EXPECT_EQ(too_far->failure->code, Errc::kTruncated);
  auto missing = part({});
  missing->path = dir_ / "missing";
  open_part(*missing, files_, kMiB);
  ASSERT_TRUE(missing->failure);
  EXPECT_EQ(missing->failure->code, std::errc::no_such_file_or_directory);
  EXPECT_EQ(missing->failure->path, missing->path);
}

TEST(FailureTest, EveryExceptionHasACodeAndAPath) {
  const auto failure_of = [](auto thrown) {
    try {
      throw thrown;
    } catch (...) {
      return Failure::of_exception("open", "the file");
    }
  };
  const Failure own = failure_of(Error(Errc::kTruncated, "read something", "another", 7));
  EXPECT_EQ(own.error().what(), std::string("read something: ") + make_error_code(Errc::kTruncated).message());
  EXPECT_EQ(own.path, "another");
  EXPECT_EQ(own.offset_bytes, 7u);
  const Failure system = failure_of(std::system_error(EDEADLK, std::generic_category()));
  EXPECT_EQ(system.code, std::errc::resource_deadlock_would_occur);
  EXPECT_EQ(system.path, "the file");
  EXPECT_EQ(failure_of(std::bad_alloc()).code, std::errc::not_enough_memory);
  EXPECT_EQ(failure_of(std::length_error("vector")).code, std::errc::not_enough_memory);
  const Failure fault = failure_of(std::logic_error("an index"));
  EXPECT_EQ(fault.code, std::errc::state_not_recoverable);
  EXPECT_EQ(fault.context, "open the file: an index");
}

TEST_F(PartTest, ChecksumsOfMoreThanTheFileHasAreItsEnd) {
  auto wanted = part({});
  wanted->checksums = Checksums{.size_bytes = 3 * kMiB, .crc32c = {1, 2, 3}};
  open_part(*wanted, files_, kMiB);
  ASSERT_TRUE(wanted->failure);
  EXPECT_EQ(wanted->failure->code, Errc::kTruncated);
}

TEST_F(PartTest, AFileThatHasChangedFailsTheCheck) {
  auto wanted = part({});
  open_part(*wanted, files_, kMiB);
  ASSERT_FALSE(wanted->failure);
  check_part(*wanted);
  EXPECT_FALSE(wanted->failure);
  std::filesystem::resize_file(path_, kMiB);
  check_part(*wanted);
  ASSERT_TRUE(wanted->failure);
  EXPECT_EQ(wanted->failure->code, Errc::kFileChanged);
}

}  // namespace
}  // namespace flashpack::internal
