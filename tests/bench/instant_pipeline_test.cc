#include "bench/support/instant_pipeline.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <vector>

#include "engine/ground/host_region.h"
#include "tests/support/temp_dir.h"

namespace flashpack::bench {
namespace {

constexpr std::size_t kFileBytes = 64 << 20;

class InstantPipelineTest : public ::testing::Test {
 protected:
  InstantPipelineTest() {
    flashpack::testing::write_file(path_, std::vector<std::byte>(1, std::byte{1}));
    std::filesystem::resize_file(path_, kFileBytes);
    std::ranges::fill(memory_.bytes(), std::byte{7});
  }

  TransferStats load(std::size_t phase, CachePolicy cache) {
    return pipeline_.load(
        {.files = {{.path = path_, .extents = {{0, kFileBytes, memory_.data() + phase}}}}, .cache = cache});
  }

  flashpack::testing::TempDir dir_;
  const std::filesystem::path path_ = dir_ / "file";
  internal::HostRegion memory_{kFileBytes + 4096, "a test"};
  InstantPipeline pipeline_;
};

TEST_F(InstantPipelineTest, MovesEveryChunkButNoByte) {
  for (const std::size_t phase : {0u, 64u}) {
    for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered, CachePolicy::kAuto}) {
      const TransferStats stats = load(phase, cache);
      EXPECT_EQ(stats.direct_bytes + stats.buffered_bytes, kFileBytes);
      EXPECT_EQ(stats.operations, kFileBytes >> 22);
    }
  }
  EXPECT_TRUE(std::ranges::all_of(memory_.bytes(), [](std::byte byte) { return byte == std::byte{7}; }));
}

TEST_F(InstantPipelineTest, CountsTheTimeOfItsDriverAlone) {
  const double before = pipeline_.driver_cpu_seconds();
  load(0, CachePolicy::kDirect);
  EXPECT_GT(pipeline_.driver_cpu_seconds(), before);
}

TEST_F(InstantPipelineTest, ReportsErrorsOfFilesAsAnEngineDoes) {
  std::filesystem::remove(path_);
  EXPECT_THROW(load(0, CachePolicy::kDirect), Error);
}

}  // namespace
}  // namespace flashpack::bench
