#include "engine/part.h"

#include <gtest/gtest.h>

#include "tests/support/bulk.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack::internal {
namespace {

using testing::kMiB;

TEST(PartTest, AFileThatHasChangedFailsTheCheck) {
  const flashpack::testing::TempDir dir;
  const std::filesystem::path path = dir / "file";
  testing::write_file(path, testing::random_bytes(2 * kMiB));
  const PartRequest wanted{.path = path};
  FileTable files(nullptr);
  const PlannedFile planned{.open = files.open(path, {}, false)};
  EXPECT_FALSE(check_part(wanted, planned).failure);
  std::filesystem::resize_file(path, kMiB);
  const PartResult result = check_part(wanted, planned);
  ASSERT_TRUE(result.failure);
  EXPECT_EQ(result.failure->code, Errc::kFileChanged);
}

TEST(HandoverTest, TheFirstWhoClaimsTheMemoryHasItUntilItIsReleased) {
  Handover handover;
  EXPECT_TRUE(handover.claim_memory());
  EXPECT_FALSE(handover.claim_memory());
  handover.release_memory();
  EXPECT_TRUE(handover.claim_memory());
}

}  // namespace
}  // namespace flashpack::internal
