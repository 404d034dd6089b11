#include "engine/ground/host_region.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <utility>

#include "engine/ground/unique_fd.h"
#include "engine/ground/units.h"
#include "flashpack/error.h"

namespace flashpack::internal {
namespace {

// It allocates nothing, because the heap would grow and shrink by pages that are counted.
std::uint64_t mapped_pages() {
  std::array<char, 128> text{};
  const UniqueFd statm(::open("/proc/self/statm", O_RDONLY | O_CLOEXEC));
  return ::read(statm.get(), text.data(), text.size() - 1) > 0 ? std::strtoull(text.data(), nullptr, 10) : 0;
}

TEST(HostRegion, BeginsAtAPageOrIfItIsLargeAtAHugePage) {
  for (const std::uint64_t size : std::initializer_list<std::uint64_t>{1, 5000, 2 * kMiB, 5 * kMiB + 3}) {
    const HostRegion region(size, "this test");
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(region.data()) % (size < 2 * kMiB ? 4096 : 2 * kMiB), 0u);
    ASSERT_EQ(region.bytes().size(), size);
    region.bytes().front() = std::byte{1};
    region.bytes().back() = std::byte{2};
  }
}

TEST(HostRegion, GivesItsMemoryBackOnceWhoeverHasIt) {
  const std::uint64_t before = mapped_pages();
  {
    HostRegion region(1024 * kMiB, "this test");
    const HostRegion moved(std::move(region));
    EXPECT_GE(mapped_pages(), before + 1024 * kMiB / 4096);
    EXPECT_EQ(moved.bytes().size(), 1024 * kMiB);
  }
  EXPECT_LT(mapped_pages(), before + 2 * kMiB / 4096) << "nor is anything left of what alignment took";
}

TEST(HostRegion, MemoryThatCannotBeHadIsAnErrorOfTheSystemThatNamesThePurpose) {
  try {
    const HostRegion region(std::uint64_t{1} << 60, "this test");
    FAIL() << "mapped an exbibyte";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), std::errc::not_enough_memory);
    EXPECT_NE(std::string(error.what()).find("bytes of memory for this test"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace flashpack::internal
