// An engine that outlives the CUDA runtime, as a static one may at the end of a process.
#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <system_error>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/fake_cuda.h"
#include "tests/support/hang.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"
#include "tests/support/wait_until.h"

namespace flashpack {
namespace {

using testing::FakeCuda;
using testing::kMiB;

EngineOptions options() {
  return {.device = {Device::Kind::kCuda, 1}, .chunk_bytes = kMiB, .staging_bytes = 4 * kMiB, .workers = 2};
}

TEST(CudaExitTest, AnIdleEngineEndsQuietly) {
  FakeCuda::get().reset();
  {
    const Engine engine(options());
    FakeCuda::get().unload();
  }
  FakeCuda::get().reset();
}

TEST(CudaExitTest, ALoadWithCopiesUnderWayEndsWithTheErrorThatSaysSo) {
  FakeCuda& cuda = FakeCuda::get();
  cuda.reset();
  const testing::TempDir dir;
  testing::write_file(dir / "file", testing::random_bytes(9 * kMiB));
  std::byte* const target = cuda.allocate(9 * kMiB);
  {
    Engine engine(options());
    cuda.hold(true);
    Transfer transfer = engine.start_load({.files = {{.path = dir / "file", .extents = {{0, 9 * kMiB, target}}}}});
    testing::wait_until([&] { return cuda.most_copies_under_way() > 0; });
    cuda.unload();
    ASSERT_TRUE(transfer.wait_for(testing::kHang));
    EXPECT_EQ(transfer.error(), std::error_code(cudaErrorCudartUnloading, cuda_category()));
    EXPECT_NE(transfer.error_text().find("cudaErrorCudartUnloading"), std::string::npos) << transfer.error_text();
  }
  cuda.reset();
}

TEST(CudaExitTest, WhatBeginsAfterwardsIsAnErrorThatSaysSo) {
  FakeCuda& cuda = FakeCuda::get();
  cuda.reset();
  const testing::TempDir dir;
  testing::write_file(dir / "file", testing::random_bytes(kMiB));
  std::byte* const target = cuda.allocate(kMiB);
  const std::error_code unloading(cudaErrorCudartUnloading, cuda_category());
  const auto code_of = [](const auto& call) {
    try {
      call();
    } catch (const Error& error) {
      return error.code();
    }
    return std::error_code();
  };
  {
    Engine engine(options());
    cuda.unload();
    EXPECT_EQ(code_of([&] { engine.load({.files = {{.path = dir / "file", .extents = {{0, kMiB, target}}}}}); }),
              unloading);
    EXPECT_EQ(code_of([&] { engine.create(dir / "new", {}).write({.extents = {{0, kMiB, target}}}); }), unloading);
    EXPECT_EQ(code_of([] { const Engine late(options()); }), unloading);
  }
  cuda.reset();
}

}  // namespace
}  // namespace flashpack
