#include "engine/staging.h"

#include <gtest/gtest.h>
#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bitset>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>

#include "engine/ground/error.h"
#include "tests/support/units.h"

namespace flashpack::internal {
namespace {

using testing::kMiB;

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

using Nodes = std::bitset<1024>;  // The most that Linux is built for.

// Asks the kernel for the policy and nodes that `flags` says. Returns 0 or an errno.
int get_policy(int& policy, Nodes& nodes, void* address, unsigned long flags) {
  static_assert(sizeof(Nodes) == 1024 / 8);
  return ::syscall(SYS_get_mempolicy, &policy, &nodes, nodes.size(), address, flags) == 0 ? 0 : errno;
}

TEST(StagingTest, ItsPagesLieOnTheNodeThatIsAskedFor) {
  int policy = 0;
  Nodes nodes;
  if (const int error = get_policy(policy, nodes, nullptr, MPOL_F_MEMS_ALLOWED))
    GTEST_SKIP() << "the kernel does not tell of NUMA nodes here: " << errno_code(error).message();
  std::size_t node = nodes.size() - 1;
  while (!nodes[node]) --node;

  const Staging staging(2 * kMiB, kMiB, static_cast<int>(node));
  EXPECT_EQ(staging.fallback_reason(), "");
  for (const auto slot : staging.slots()) {
    ASSERT_EQ(get_policy(policy, nodes, slot.data(), MPOL_F_ADDR), 0);
    EXPECT_EQ(policy, MPOL_PREFERRED);
    EXPECT_EQ(nodes, Nodes().set(node));
    slot.front() = std::byte{1};
    int node_of_page = -1;
    ASSERT_EQ(get_policy(node_of_page, nodes, slot.data(), MPOL_F_NODE | MPOL_F_ADDR), 0);
    EXPECT_EQ(node_of_page, static_cast<int>(node));
  }
}

TEST(StagingTest, TheCallersMemoryComesFirstAndTheEnginesOwnBehindIt) {
  const HostRegion callers(5 * kMiB, "a test");
  const Staging staging(callers.bytes(), 2 * kMiB, 4 * kMiB);
  ASSERT_EQ(staging.slots().size(), 4u);
  EXPECT_EQ(staging.slots()[0].data(), callers.data());
  EXPECT_EQ(staging.slots()[1].data(), callers.data() + 2 * kMiB);
  EXPECT_EQ(staging.slots()[3].data(), staging.slots()[2].data() + 2 * kMiB);
  for (const auto slot : staging.slots()) std::memset(slot.data(), 1, slot.size());
  EXPECT_EQ(callers.bytes()[4 * kMiB], std::byte{0}) << "a rest that is no whole slot";
}

TEST(StagingTest, ForkedChildrenInheritTheCallersMemoryAgainAfterItsEnd) {
  const HostRegion callers(4 * kMiB, "a test");
  {
    const Staging staging(callers.bytes(), kMiB, 0);
    EXPECT_EQ(staging.slots().size(), 4u);
    EXPECT_NE(mapping_flags(callers.data()).find(" dc"), std::string::npos);
  }
  EXPECT_EQ(mapping_flags(callers.data()).find(" dc"), std::string::npos);
}

}  // namespace
}  // namespace flashpack::internal
