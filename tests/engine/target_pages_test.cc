#include "engine/ground/target_pages.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "flashpack/host_memory.h"

namespace flashpack::internal {
namespace {

using std::chrono::milliseconds;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

// Kept memory would be on the pages that it was on before.
class TargetPagesTest : public testing::Test {
 protected:
  TargetPagesTest() { HostMemory::release_kept(); }
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
  const HostMemory memory(64 * kMiB);
  auto& pages = TargetPages::of_process();
  pages.was_touched(memory.bytes().first(8 * kMiB), milliseconds(40));
  EXPECT_FALSE(is_on_small_pages(memory.data()));
  EXPECT_FALSE(is_on_small_pages(memory.data() + 8 * kMiB - 1));
  EXPECT_TRUE(is_on_small_pages(memory.data() + 8 * kMiB));
  EXPECT_TRUE(is_on_small_pages(memory.data() + 64 * kMiB - 1));
}

TEST_F(TargetPagesTest, AFewDearHugePagesAmongCheapOnesChangeNothing) {
  const HostMemory memory(256 * kMiB);
  auto& pages = TargetPages::of_process();
  pages.was_touched(memory.bytes().first(32 * kMiB), milliseconds(3));
  for (std::uint64_t at = 32 * kMiB; at < 256 * kMiB; at += 32 * kMiB) {
    pages.was_touched(memory.bytes().subspan(at, 4 * kMiB), milliseconds(9));
    pages.was_touched(memory.bytes().subspan(at + 4 * kMiB, 28 * kMiB), milliseconds(3));
  }
  EXPECT_FALSE(is_on_small_pages(memory.data() + 256 * kMiB - 1));
}

TEST_F(TargetPagesTest, MemoryOfOtherOriginIsIgnored) {
  const HostMemory memory(4 * kMiB);
  std::vector<std::byte> other(16 * kMiB);
  auto& pages = TargetPages::of_process();
  pages.was_touched(other, milliseconds(1000));
  pages.was_touched({memory.data(), 64 * kMiB}, milliseconds(1000));
  pages.was_touched({memory.data() - 64 * kMiB, 64 * kMiB}, milliseconds(1000));
  EXPECT_FALSE(is_on_small_pages(memory.data()));
}

}  // namespace
}  // namespace flashpack::internal
