#include "flashpack/host_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <initializer_list>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/byte_work.h"
#include "engine/ground/units.h"
#include "flashpack/engine.h"
#include "flashpack/error.h"

namespace flashpack {
namespace {

using internal::kMiB;

class HostMemoryTest : public testing::Test {
 protected:
  static bool keeps() {
    const HostMemoryPool pool;
    {
      const HostMemory trial(pool, 2 * kMiB);
    }
    return pool.kept_bytes() > 0;
  }

  HostMemoryPool pool_;
};

TEST_F(HostMemoryTest, DataAgreesWithTheFileOffsetModuloAPageOrAHugePage) {
  for (const std::uint64_t size : std::initializer_list<std::uint64_t>{1, 5000, 2 * kMiB, 5 * kMiB + 3}) {
    for (const std::uint64_t offset : std::initializer_list<std::uint64_t>{0, 4097, 2 * kMiB - 1, 3 * kMiB + 128}) {
      const HostMemory memory(pool_, size, offset);
      const std::uint64_t granule = size < 2 * kMiB ? 4096 : 2 * kMiB;
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.data()) % granule, offset % granule);
      ASSERT_EQ(memory.bytes().size(), size);
      std::ranges::fill(memory.bytes(), std::byte{1});
    }
  }
}

TEST_F(HostMemoryTest, MemoryThatCannotBeHadIsAnErrorOfTheSystem) {
  try {
    const HostMemory memory(pool_, std::uint64_t{1} << 60);
    FAIL() << "mapped an exbibyte";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), std::errc::not_enough_memory);
    EXPECT_NE(std::string(error.what()).find("bytes of memory for tensors"), std::string::npos) << error.what();
  }
}

TEST_F(HostMemoryTest, MoreThanThereCanBeIsRefusedAndNothingIsMemory) {
  constexpr std::size_t kMost = ~std::size_t{0};
  for (const auto& [size, offset] : {std::pair{kMost, std::uint64_t{100}}, {kMost - 10, 4095}, {kMost - kMiB, 0}}) {
    try {
      const HostMemory memory(pool_, size, offset);
      ADD_FAILURE() << size;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), std::errc::not_enough_memory);
    }
  }
  EXPECT_EQ(HostMemory(pool_, 0).bytes().size(), 0u);
}

TEST_F(HostMemoryTest, PagesOfMemoryThatIsGoneServeTheNext) {
  if (!keeps()) GTEST_SKIP() << "the kernel is too old, or the address space is limited";
  std::optional<HostMemory> first(std::in_place, pool_, 64 * kMiB);
  std::ranges::fill(first->bytes(), std::byte{1});
  first.reset();
  const HostMemory second(pool_, 32 * kMiB);
  const HostMemory third(pool_, 30 * kMiB, 2 * kMiB - 1);
  EXPECT_TRUE(internal::is_populated(second.bytes()));
  EXPECT_TRUE(internal::is_populated(third.bytes()));
}

TEST_F(HostMemoryTest, NeighboursThatAreGoneServeAsOne) {
  if (!keeps()) GTEST_SKIP() << "the kernel is too old, or the address space is limited";
  for (const auto& order : {std::array{0, 1, 2}, std::array{2, 1, 0}, std::array{0, 2, 1}}) {
    pool_.release_kept();
    {
      const HostMemory whole(pool_, 96 * kMiB);
    }
    std::array<std::optional<HostMemory>, 3> parts;
    for (auto& part : parts) part.emplace(pool_, 32 * kMiB);
    ASSERT_EQ(pool_.kept_bytes(), 0u);
    for (const int i : order) parts[static_cast<std::size_t>(i)].reset();
    EXPECT_EQ(pool_.kept_bytes(), 96 * kMiB);
    const HostMemory whole(pool_, 96 * kMiB);
    EXPECT_EQ(pool_.kept_bytes(), 0u);
  }
}

TEST_F(HostMemoryTest, NoMoreIsHeldThanWasOnceUsed) {
  if (!keeps()) GTEST_SKIP() << "the kernel is too old, or the address space is limited";
  {
    const HostMemory most(pool_, 1000 * kMiB);
  }
  ASSERT_EQ(pool_.kept_bytes(), 1000 * kMiB);
  {
    const HostMemory kept(pool_, 400 * kMiB);
    const HostMemory fresh(pool_, 700 * kMiB);
    EXPECT_EQ(pool_.kept_bytes(), 0u);
  }
  const HostMemory kept(pool_, 600 * kMiB);
  const HostMemory fresh(pool_, 450 * kMiB);
  EXPECT_EQ(pool_.kept_bytes(), 50 * kMiB);
}

TEST_F(HostMemoryTest, KeptMemoryIsGivenBackOnRequest) {
  {
    const HostMemory memory(pool_, 64 * kMiB);
  }
  pool_.release_kept();
  EXPECT_EQ(pool_.kept_bytes(), 0u);
  const HostMemory memory(pool_, 64 * kMiB);
  EXPECT_FALSE(internal::is_populated(memory.bytes()));
}

TEST_F(HostMemoryTest, APoolKeepsNothingForAnother) {
  if (!keeps()) GTEST_SKIP() << "the kernel is too old, or the address space is limited";
  {
    const HostMemory memory(pool_, 8 * kMiB);
  }
  const HostMemoryPool other;
  const HostMemory memory(other, 8 * kMiB);
  EXPECT_EQ(other.kept_bytes(), 0u);
  EXPECT_EQ(pool_.kept_bytes(), 8 * kMiB);
}

TEST_F(HostMemoryTest, AnEngineHasThePoolThatItWasMadeWith) {
  const Engine first({.memory_pool = pool_});
  const Engine second({.memory_pool = pool_});
  {
    const HostMemory memory(first.options().memory_pool, 8 * kMiB);
  }
  EXPECT_EQ(second.options().memory_pool.kept_bytes(), pool_.kept_bytes());
  EXPECT_EQ(pool_.kept_bytes() > 0, keeps());
}

TEST_F(HostMemoryTest, OptionsThatAnEngineHasTakenStillHaveTheirPool) {
  EngineOptions options;
  const Engine engine(std::move(options));
  const HostMemory memory(options.memory_pool, 8 * kMiB);  // NOLINT(bugprone-use-after-move): it is promised.
  EXPECT_EQ(memory.bytes().size(), 8 * kMiB);
}

TEST_F(HostMemoryTest, MemoryMayOutliveItsPoolWhichThenGivesAllPagesBack) {
  if (!keeps()) GTEST_SKIP() << "the kernel is too old, or the address space is limited";
  const std::byte* kept = nullptr;
  {
    std::optional<HostMemoryPool> pool(std::in_place);
    std::optional<HostMemory> memory(std::in_place, *pool, 8 * kMiB);
    {
      const HostMemory other(*pool, 8 * kMiB);
      kept = other.data();
    }
    pool.reset();
    std::ranges::fill(memory->bytes(), std::byte{1});
  }
  unsigned char resident = 0;
  EXPECT_NE(::mincore(const_cast<std::byte*>(kept), 4096, &resident), 0) << "it is still mapped";
}

TEST_F(HostMemoryTest, ThreadsNeverShareMemory) {
  const auto work = [this](std::byte mark) {
    for (std::uint64_t round = 0; round < 50; ++round) {
      const HostMemory memory(pool_, (2 + round % 5) * kMiB, round * 4096);
      for (std::uint64_t at = 0; at < memory.bytes().size(); at += 4096) memory.data()[at] = mark;
      for (std::uint64_t at = 0; at < memory.bytes().size(); at += 4096) ASSERT_EQ(memory.data()[at], mark);
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i <= 4; ++i) threads.emplace_back(work, std::byte(i));
  for (std::thread& thread : threads) thread.join();
}

TEST_F(HostMemoryTest, NothingIsKeptWhereTheAddressSpaceIsLimited) {
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const rlimit limit{RLIM_INFINITY - 1, RLIM_INFINITY};  // Sanitizers take a lot of it.
    if (::setrlimit(RLIMIT_AS, &limit) != 0) ::_exit(2);
    {
      const HostMemory memory(pool_, 8 * kMiB);
    }
    ::_exit(pool_.kept_bytes() == 0 ? 0 : 1);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
}

TEST_F(HostMemoryTest, KeptMemoryIsNotInheritedByAForkedChild) {
  if (!keeps()) GTEST_SKIP() << "the kernel is too old, or the address space is limited";
  const std::byte* kept = nullptr;
  {
    const HostMemory memory(pool_, 8 * kMiB);
    kept = memory.data();
  }
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    unsigned char resident = 0;
    const bool is_mapped = ::mincore(const_cast<std::byte*>(kept), 4096, &resident) == 0;
    ::_exit(pool_.kept_bytes() == 0 && !is_mapped ? 0 : 1);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  const HostMemory memory(pool_, 8 * kMiB);
  EXPECT_EQ(memory.data(), kept);
}

TEST_F(HostMemoryTest, MemoryThatWasKeptIsInheritedOnceItIsUsedAgain) {
  {
    const HostMemory memory(pool_, 8 * kMiB);
  }
  const HostMemory memory(pool_, 8 * kMiB);
  memory.data()[5] = std::byte{7};
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) ::_exit(memory.data()[5] == std::byte{7} ? 0 : 1);
  int status = -1;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
}

TEST_F(HostMemoryTest, AForkedChildMayUseAndDestroyMemoryOfItsParentsPool) {
  std::optional<HostMemory> memory(std::in_place, pool_, 8 * kMiB);
  std::ranges::fill(memory->bytes(), std::byte{7});
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const bool right = memory->data()[5] == std::byte{7};
    memory.reset();
    const HostMemory more(pool_, 4 * kMiB);
    std::ranges::fill(more.bytes(), std::byte{1});
    pool_.release_kept();
    ::_exit(right && pool_.kept_bytes() == 0 ? 0 : 1);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(memory->data()[5], std::byte{7});
}

TEST_F(HostMemoryTest, AForkedChildHasMemoryWhateverOtherThreadsDidAndMayDestroyThePool) {
  std::optional<HostMemoryPool> pool(std::in_place);
  std::atomic<bool> stop = false;
  std::thread other([&] {
    while (!stop) const HostMemory memory(*pool, 2 * kMiB);
  });
  for (int i = 0; i < 20; ++i) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      {
        const HostMemory memory(*pool, 4 * kMiB);
      }
      pool.reset();
      ::_exit(0);
    }
    int status = -1;
    ::waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
  }
  stop = true;
  other.join();
}

}  // namespace
}  // namespace flashpack
