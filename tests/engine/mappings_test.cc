#include "engine/ground/mappings.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <iterator>
#include <span>

#include "engine/ground/pages.h"
#include "flashpack/unique_fd.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

using flashpack::testing::run_in_child;

bool are_anonymous_and_readable(std::span<const std::byte> memory) {
  return Mappings().are_anonymous_and_readable(memory);
}

class MappingsTest : public ::testing::Test {
 protected:
  MappingsTest() {
    // Inaccessible pages around the memory keep the kernel from merging it with other mappings.
    void* const at = ::mmap(nullptr, 8 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) ADD_FAILURE() << "mmap";
    memory_ = {static_cast<std::byte*>(at) + page_, 6 * page_};
    ::mprotect(memory_.data(), memory_.size(), PROT_READ | PROT_WRITE);
  }
  ~MappingsTest() override { ::munmap(memory_.data() - page_, memory_.size() + 2 * page_); }

  void SetUp() override {
    if (!are_anonymous_and_readable(memory_)) GTEST_SKIP() << "the kernel does not tell, as before Linux 6.11";
  }

  // Maps page `page` of the memory anew.
  void map(std::size_t page, int flags, int fd) {
    EXPECT_NE(::mmap(memory_.data() + page * page_, page_, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0),
              MAP_FAILED);
  }

  const std::size_t page_ = system_page_bytes();
  std::span<std::byte> memory_;
};

TEST_F(MappingsTest, SeveralMappingsAreAskedAboutAndPartsOfPages) {
  ::mprotect(memory_.data() + page_, 2 * page_, PROT_READ);
  EXPECT_TRUE(are_anonymous_and_readable(memory_));
  EXPECT_TRUE(are_anonymous_and_readable(memory_.subspan(1, memory_.size() - 2)));
  EXPECT_FALSE(are_anonymous_and_readable({memory_.data(), memory_.size() + 1})) << "an inaccessible page is behind it";
  EXPECT_FALSE(are_anonymous_and_readable({memory_.data() - 1, 2}));
}

TEST_F(MappingsTest, WhatIsNotReadableNotMappedOrSharedIsFoundInTheMiddleToo) {
  for (const std::size_t page : {0u, 3u, 5u}) {
    std::byte* const at = memory_.data() + page * page_;
    ::mprotect(at, page_, PROT_NONE);
    EXPECT_FALSE(are_anonymous_and_readable(memory_));
    ::munmap(at, page_);
    EXPECT_FALSE(are_anonymous_and_readable(memory_));
    map(page, MAP_SHARED | MAP_ANONYMOUS, -1);
    EXPECT_FALSE(are_anonymous_and_readable(memory_));
    map(page, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    EXPECT_TRUE(are_anonymous_and_readable(memory_));
  }
}

TEST_F(MappingsTest, APrivateMappingOfAFileIsNotAnonymousEvenWhereItsPagesAre) {
  const flashpack::testing::TempDir dir;
  const UniqueFd file(::open((dir / "file").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(::ftruncate(file.get(), static_cast<off_t>(page_)), 0);
  map(3, MAP_PRIVATE, file.get());
  EXPECT_FALSE(are_anonymous_and_readable(memory_));
  memory_[3 * page_] = std::byte{1};  // The page is now a copy of the file's.
  EXPECT_FALSE(are_anonymous_and_readable(memory_));
  const UniqueFd zero(::open("/dev/zero", O_RDWR | O_CLOEXEC));
  map(3, MAP_PRIVATE, zero.get());
  EXPECT_FALSE(are_anonymous_and_readable(memory_));
}

TEST_F(MappingsTest, AForkedChildIsToldOfItsOwnMemory) {
  EXPECT_EQ(run_in_child([&] {
              ::mprotect(memory_.data(), page_, PROT_NONE);
              return are_anonymous_and_readable(memory_) ? 1 : 0;
            }),
            0);
  EXPECT_TRUE(are_anonymous_and_readable(memory_));
}

TEST_F(MappingsTest, WithoutProcAndWhereTheQuestionIsForbiddenNothingIsKnown) {
  for (const long number : {SYS_openat, SYS_ioctl}) {
    const int result = run_in_child([&] {
      if (!flashpack::testing::deny_syscall(static_cast<unsigned>(number), EPERM)) return flashpack::testing::kSkip;
      return are_anonymous_and_readable(memory_) ? 1 : 0;
    });
    if (result == flashpack::testing::kSkip) GTEST_SKIP() << "no seccomp here";
    EXPECT_EQ(result, 0);
  }
}

TEST_F(MappingsTest, NoDescriptorIsKeptForLongerThanTheObjectAndNoneIsInherited) {
  const auto count = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator());
  };
  const auto before = count();
  {
    const int next = ::dup(0);
    ::close(next);
    Mappings mappings;
    EXPECT_EQ(count(), before);
    EXPECT_TRUE(mappings.are_anonymous_and_readable(memory_));
    EXPECT_TRUE(mappings.are_anonymous_and_readable(memory_));
    EXPECT_EQ(count(), before + 1);
    EXPECT_EQ(::fcntl(next, F_GETFD), FD_CLOEXEC);
  }
  EXPECT_EQ(count(), before);
}

}  // namespace
}  // namespace flashpack::internal
