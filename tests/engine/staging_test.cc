#include "engine/staging.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace flashpack::engine {
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

TEST(StagingTest, AForkedChildDoesNotInheritIt) {
  const Staging staging(2 * kMiB, kMiB);
  std::byte* memory = staging.slots().front().data();
  *memory = std::byte{1};
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    unsigned char resident = 0;
    const bool gone = ::mincore(memory, 4096, &resident) != 0 && errno == ENOMEM;
    ::_exit(gone ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace flashpack::engine
