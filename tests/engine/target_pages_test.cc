#include "engine/ground/target_pages.h"

#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "engine/ground/host_region.h"
#include "tests/support/units.h"

namespace flashpack::internal {
namespace {

using testing::kMiB;

using std::chrono::milliseconds;

// Each test has its own pages, because those of the process remember what huge pages have cost.
class TargetPagesTest : public ::testing::Test {
 protected:
  std::span<std::byte> take(std::uint64_t size_bytes) { return taken_.emplace_back(pages.take(0, size_bytes)); }
  ~TargetPagesTest() override {
    for (const auto memory : taken_) unmap(memory);
  }

  TargetPages pages;

 private:
  std::vector<std::span<std::byte>> taken_;
};

// The flags that the kernel has for the mapping with `address`.
std::string flags_at(const std::byte* address) {
  std::ifstream maps("/proc/self/smaps");
  bool found = false;
  for (std::string line; std::getline(maps, line);) {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;
    char dash = 0;
    if (std::istringstream(line) >> std::hex >> begin >> dash >> end && dash == '-') {
      const auto wanted = reinterpret_cast<std::uintptr_t>(address);
      found = begin <= wanted && wanted < end;
    }
    if (found && line.starts_with("VmFlags:")) return line + ' ';
  }
  return "";
}

bool is_on_small_pages(const std::byte* address) { return flags_at(address).find(" nh ") != std::string::npos; }

TEST_F(TargetPagesTest, HugePagesThatAreDearGiveWayToSmallOnesFromThereOn) {
  const std::span memory = take(64 * kMiB);
  pages.was_touched(memory.first(8 * kMiB), milliseconds(40));
  EXPECT_FALSE(is_on_small_pages(memory.data()));
  EXPECT_FALSE(is_on_small_pages(memory.data() + 8 * kMiB - 1));
  EXPECT_TRUE(is_on_small_pages(memory.data() + 8 * kMiB));
  EXPECT_TRUE(is_on_small_pages(memory.data() + 64 * kMiB - 1));
}

TEST_F(TargetPagesTest, DearHugePagesAreTriedAgainInAFractionOfFreshMemoryAndUsedWhenTheyAreCheapAgain) {
  const auto gets_huge_pages = [&] { return !is_on_small_pages(take(64 * kMiB).data()); };
  pages.was_touched(take(64 * kMiB).first(8 * kMiB), milliseconds(40));
  for (std::uint64_t bytes = 64 * kMiB; bytes < 1024 * kMiB; bytes += 64 * kMiB) EXPECT_FALSE(gets_huge_pages());
  EXPECT_TRUE(is_on_small_pages(take(4 * kMiB).data())) << "a try of so little could tell nothing";
  const std::span tried = take(64 * kMiB);
  EXPECT_FALSE(is_on_small_pages(tried.data()));
  EXPECT_FALSE(gets_huge_pages());
  pages.was_touched(tried, milliseconds(8));
  EXPECT_TRUE(gets_huge_pages());
  EXPECT_TRUE(gets_huge_pages());
}

TEST_F(TargetPagesTest, AlsoALargeMappingTriesDearHugePagesAgain) {
  pages.was_touched(take(64 * kMiB).first(8 * kMiB), milliseconds(40));
  EXPECT_FALSE(is_on_small_pages(take(2048 * kMiB).data()));
}

TEST_F(TargetPagesTest, AFewDearHugePagesAmongCheapOnesChangeNothing) {
  const std::span memory = take(256 * kMiB);
  pages.was_touched(memory.first(32 * kMiB), milliseconds(3));
  for (std::uint64_t at = 32 * kMiB; at < 256 * kMiB; at += 32 * kMiB) {
    pages.was_touched(memory.subspan(at, 4 * kMiB), milliseconds(9));
    pages.was_touched(memory.subspan(at + 4 * kMiB, 28 * kMiB), milliseconds(3));
  }
  EXPECT_FALSE(is_on_small_pages(memory.data() + 256 * kMiB - 1));
}

TEST_F(TargetPagesTest, MemoryIsKnownToHaveSmallPagesIfItGotThemBecauseHugeOnesWereDear) {
  const std::span first = take(64 * kMiB);
  EXPECT_FALSE(pages.has_small_pages(first.data()));
  pages.was_touched(first.first(8 * kMiB), milliseconds(40));
  const std::span second = take(64 * kMiB);
  for (const std::span memory : {first, second}) {
    EXPECT_TRUE(pages.has_small_pages(memory.data()));
    EXPECT_TRUE(pages.has_small_pages(memory.data() + 64 * kMiB - 1));
  }
  const std::byte other{};
  EXPECT_FALSE(pages.has_small_pages(&other));
  EXPECT_FALSE(pages.has_small_pages(nullptr));
}

TEST_F(TargetPagesTest, MemoryThatIsKeptHasTheSamePagesWhenItIsUsedAgain) {
  const std::span huge = pages.take(0, 64 * kMiB);
  const std::span small = pages.take(0, 32 * kMiB);
  pages.was_touched(small.first(8 * kMiB), milliseconds(40));
  pages.give_back(huge);
  pages.give_back(small);
  if (pages.kept_bytes() == 0) GTEST_SKIP() << "this machine keeps no pages";
  const std::span again = take(32 * kMiB);
  ASSERT_EQ(again.data(), small.data());
  EXPECT_TRUE(pages.has_small_pages(again.data()));
  const std::array<std::span<std::byte>, 2> halves{take(32 * kMiB), take(32 * kMiB)};
  for (const std::span half : halves) {
    ASSERT_TRUE(half.data() >= huge.data() && half.data() < huge.data() + huge.size());
    EXPECT_FALSE(pages.has_small_pages(half.data()));
  }
}

TEST_F(TargetPagesTest, MemoryOfOtherOriginIsIgnored) {
  const std::span memory = take(4 * kMiB);
  std::vector<std::byte> other(16 * kMiB);
  pages.was_touched(other, milliseconds(1000));
  pages.was_touched({memory.data(), 64 * kMiB}, milliseconds(1000));
  pages.was_touched({memory.data() - 64 * kMiB, 64 * kMiB}, milliseconds(1000));
  EXPECT_FALSE(is_on_small_pages(memory.data()));
}

}  // namespace
}  // namespace flashpack::internal
