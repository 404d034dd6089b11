#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "engine/copier.h"
#include "flashpack/engine.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

TEST(WithoutCuda, AnEngineOfADeviceIsRefusedAndTheErrorSaysWhy) {
  try {
    const Engine engine({.device = {Device::Kind::kCuda, 0}});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), std::errc::not_supported);
    EXPECT_NE(std::string(error.what()).find("built without"), std::string::npos) << error.what();
  }
}

TEST(WithoutCuda, ErrorsAndNodesOfDevicesAreStillAnswered) {
  EXPECT_STREQ(cuda_category().name(), "cuda");
  EXPECT_EQ(cuda_category().message(2), "cudaError_t 2");
  EXPECT_EQ(internal::numa_node_of_cuda_device(0), -1);
}

TEST(WithoutCuda, AnEngineOfTheHostLoads) {
  const testing::TempDir dir;
  const auto bytes = testing::random_bytes((3 << 20) + 77);
  testing::write_file(dir / "file", bytes);
  testing::GuardedMemory memory(bytes.size());
  const TransferStats stats =
      Engine().load({.files = {{.path = dir / "file", .extents = {{0, memory.size(), memory.data()}}}}});
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), memory.data()));
  EXPECT_TRUE(memory.intact());
  EXPECT_FALSE(stats.pinned);
}

}  // namespace
}  // namespace flashpack
