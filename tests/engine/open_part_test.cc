#include "engine/open_part.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack::internal {
namespace {

using testing::kMiB;

constexpr OpenRules kRules{.chunk_bytes = kMiB};
constexpr OpenRules kAtOnce{.chunk_bytes = kMiB, .at_once_bytes = 4096};

class OpenPartTest : public ::testing::Test {
 protected:
  OpenPartTest() { flashpack::testing::write_file(path_, bytes_); }

  PartRequest request(std::vector<Fragment> extents) const { return {.path = path_, .extents = std::move(extents)}; }

  flashpack::testing::TempDir dir_;
  const std::filesystem::path path_ = dir_ / "file";
  const std::vector<std::byte> bytes_ = flashpack::testing::random_bytes(2 * kMiB);
  FileTable files_{nullptr};
};

TEST_F(OpenPartTest, LittleThatIsCachedIsReadWhereTheFileIsOpened) {
  const flashpack::testing::HeldInCache held(path_);
  for (const CachePolicy policy : {CachePolicy::kAuto, CachePolicy::kBuffered}) {
    flashpack::testing::GuardedMemory memory(1000);
    PartRequest wanted = request({{kMiB, 500, memory.data()}, {kMiB + 1000, 500, memory.data() + 500}});
    wanted.cache = policy;
    Handover handover;
    const Opened opened = open_part(wanted, {}, handover, files_, kAtOnce);
    EXPECT_FALSE(opened.failure);
    EXPECT_FALSE(opened.planned) << "the file has been closed";
    ASSERT_TRUE(handover.result());
    EXPECT_FALSE(handover.result()->failure);
    EXPECT_EQ(handover.result()->read_bytes, 1000u);
    EXPECT_TRUE(handover.claim_memory())
        << "its transfer may end while the thread still looks at the file and closes it";
    EXPECT_TRUE(testing::same_bytes(memory.data(), bytes_.data() + kMiB, 500));
    EXPECT_TRUE(testing::same_bytes(memory.data() + 500, bytes_.data() + kMiB + 1000, 500));
    EXPECT_TRUE(memory.intact());
  }
}

TEST_F(OpenPartTest, WhatTheDriverHasClaimedOrIsToBeReadInAnotherWayIsNotReadWhereTheFileIsOpened) {
  const flashpack::testing::HeldInCache held(path_);
  flashpack::testing::GuardedMemory memory(1000);
  std::fill_n(memory.data(), memory.size(), std::byte{});
  const std::vector<std::function<void(PartRequest&, Handover&)>> ways = {
      [](PartRequest&, Handover& handover) { handover.claim_memory(); },
      [](PartRequest& wanted, Handover&) { wanted.cache = CachePolicy::kDirect; },
      [](PartRequest& wanted, Handover&) { wanted.extents[0].offset_bytes = kMiB; },  // Too far from the other.
      [](PartRequest& wanted, Handover&) { wanted.extents[1].device = 1; },
      [](PartRequest& wanted, Handover&) { wanted.checksums = {.payload_bytes = 10, .crc32c = {1}}; },
  };
  for (const auto& way : ways) {
    PartRequest wanted = request({{0, 500, memory.data()}, {500, 500, memory.data() + 500}});
    Handover handover;
    way(wanted, handover);
    const Opened opened = open_part(wanted, {}, handover, files_, kAtOnce);
    EXPECT_FALSE(opened.failure);
    EXPECT_TRUE(opened.planned);
    EXPECT_FALSE(handover.result());
  }
  EXPECT_EQ(std::count(memory.data(), memory.data() + memory.size(), std::byte{}), 1000);
}

TEST_F(OpenPartTest, WhatIsWrongWithTheFileIsKeptForTheTransfer) {
  flashpack::testing::GuardedMemory memory(100);
  Handover handover;
  const Opened too_far = open_part(request({{2 * kMiB - 50, 100, memory.data()}}), {}, handover, files_, kRules);
  ASSERT_TRUE(too_far.failure);
  EXPECT_EQ(too_far.failure->code, Errc::kTruncated);
  EXPECT_TRUE(too_far.planned) << "a thread is to close the file";
  PartRequest missing = request({});
  missing.path = dir_ / "missing";
  const Opened nothing = open_part(missing, {}, handover, files_, kRules);
  ASSERT_TRUE(nothing.failure);
  EXPECT_FALSE(nothing.planned);
  EXPECT_EQ(nothing.failure->code, std::errc::no_such_file_or_directory);
  EXPECT_EQ(nothing.failure->path, missing.path);
}

TEST_F(OpenPartTest, ChecksumsOfMoreThanTheFileHasAreItsEnd) {
  PartRequest wanted = request({});
  wanted.checksums = {.payload_bytes = 3 * kMiB, .crc32c = {1, 2, 3}};
  Handover handover;
  const Opened opened = open_part(wanted, {}, handover, files_, kRules);
  ASSERT_TRUE(opened.failure);
  EXPECT_EQ(opened.failure->code, Errc::kTruncated);
}

TEST_F(OpenPartTest, EveryReasonWhyALoadIsSlowerOrChecksLessIsKept) {
  UniqueFd in_memory(::memfd_create("a test", MFD_CLOEXEC));  // Kernels differ in whether it has direct I/O.
  ASSERT_EQ(::ftruncate(in_memory.get(), 2 * kMiB), 0);
  flashpack::testing::GuardedMemory memory(2000);
  PartRequest wanted = request({{0, 1000, memory.data()}, {500, 1000, memory.data() + 1000}});
  wanted.checksums = {.payload_bytes = kMiB, .crc32c = {1}};
  Handover handover;
  const Opened opened = open_part(wanted, std::move(in_memory), handover, files_, kRules);
  ASSERT_TRUE(opened.planned);
  const std::string& reason = opened.planned->fallback_reason;
  EXPECT_NE(reason.find("checksums: not verified, extents overlap"), std::string::npos) << reason;
  if (opened.planned->file().direct_fd() < 0) {
    EXPECT_NE(reason.find("direct I/O: "), std::string::npos) << reason;
  }
}

}  // namespace
}  // namespace flashpack::internal
