// The rest of a process that uses CUDA: other devices, other memory, other users of the same context.
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "tests/support/device_test.h"
#include "tests/support/guarded_memory.h"

namespace flashpack {
namespace {

using testing::cuda;
using testing::error_of;
using testing::kHang;

class CudaWorldTest : public testing::DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Backends, CudaWorldTest, testing::kBackends, testing::backend_name);

TEST_P(CudaWorldTest, NoContextIsMadeButTheEngines) {
  testing::GuardedMemory memory(bytes_.size());
  std::byte* target = cuda().allocate(bytes_.size());
  engine_->load(request(target));
  engine_->load(request(memory.data()));
  engine_->create(dir_ / "new", {}).write({{0, bytes_.size(), target}});
  Transfer cancelled = engine_->start_load(request(target));
  cancelled.cancel();
  EXPECT_TRUE(cancelled.wait_for(kHang));
  std::thread([&] { engine_->load(request(target)); }).join();
  engine_.reset();
  EXPECT_TRUE(cuda().has_context(1));
  EXPECT_FALSE(cuda().has_context(0));
  int device = -1;
  EXPECT_EQ(cudaGetDevice(&device), cudaSuccess);
  EXPECT_EQ(device, 0);
}

TEST_P(CudaWorldTest, MemoryOfAnotherDeviceIsRefused) {
  std::byte* elsewhere = cuda().allocate(bytes_.size(), 0);
  const auto error = error_of([&] { engine_->load(request(elsewhere)); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), Errc::kInvalidArgument) << error->what();
  EXPECT_TRUE(untouched(elsewhere));
}

TEST_P(CudaWorldTest, TheCallersCurrentDeviceIsLeftAlone) {
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  engine_->load(request(cuda().allocate(bytes_.size())));
  int device = -1;
  cudaGetDevice(&device);
  EXPECT_EQ(device, 0) << "the engine is on device 1";
}

TEST_P(CudaWorldTest, ADeviceThatIsCurrentAlreadyIsNotSetAgain) {
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  const int calls = cuda().calls("cudaSetDevice");
  engine_->load(request(cuda().allocate(bytes_.size())));
  EXPECT_EQ(cuda().calls("cudaSetDevice"), calls);
  cudaSetDevice(0);
}

}  // namespace
}  // namespace flashpack
