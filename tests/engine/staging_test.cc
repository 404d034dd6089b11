#include "engine/staging.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>

namespace flashpack::internal {
namespace {

constexpr std::uint32_t kMiB = 1u << 20;

TEST(StagingTest, SlotsFollowEachOtherFromAHugePageOn) {
  const Staging staging(5 * kMiB, kMiB);
  ASSERT_EQ(staging.slots().size(), 5u);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(staging.slots().front().data()) % (2 * kMiB), 0u);
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(staging.slots()[i].data(), staging.slots().front().data() + i * kMiB);
    EXPECT_EQ(staging.slots()[i].size(), kMiB);
  }
}

TEST(StagingTest, EveryByteCanBeWritten) {
  const Staging staging(4 * kMiB, 2 * kMiB);
  for (const auto slot : staging.slots()) std::memset(slot.data(), 1, slot.size());
  EXPECT_EQ(staging.slots().back().back(), std::byte{1});
}

TEST(StagingTest, ARestThatIsNoWholeSlotIsNotUsed) { EXPECT_EQ(Staging(5 * kMiB, 2 * kMiB).slots().size(), 2u); }

/// What the kernel was told of the mapping that holds `address`, as in "rd wr dc".
std::string mapping_flags(const void* address) {
  std::ifstream maps("/proc/self/smaps");
  bool inside = false;
  for (std::string line; std::getline(maps, line);) {
    unsigned long begin = 0;
    unsigned long end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) {
      const auto wanted = reinterpret_cast<unsigned long>(address);
      inside = begin <= wanted && wanted < end;
    }
    if (inside && line.starts_with("VmFlags:")) return line;
  }
  return {};
}

TEST(StagingTest, ForkedChildrenDoNotInheritIt) {
  const Staging staging(2 * kMiB, kMiB);
  const std::string flags = mapping_flags(staging.slots().back().data());
  EXPECT_NE(flags.find(" dc"), std::string::npos) << flags;
}

}  // namespace
}  // namespace flashpack::internal
