// The work of the caller's streams comes first, and is never disturbed: kernels, allocations, captures of graphs.
#include "engine/gate_cuda.h"

#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <thread>

#include "tests/support/device_test.h"
#include "tests/support/guarded_memory.h"

namespace flashpack {
namespace {

using testing::CallersStream;
using testing::cuda;
using testing::error_of;

constexpr std::array kCaptureModes = {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal,
                                      cudaStreamCaptureModeRelaxed};

// One that waits for the legacy default stream, on the engine's device.
struct BlockingStream {
  BlockingStream() {
    cudaSetDevice(1);
    cudaStreamCreate(&stream);
  }
  ~BlockingStream() { cudaStreamDestroy(stream); }
  cudaStream_t stream = nullptr;
};

class CudaGateTest : public testing::DeviceTest {
 protected:
  Transfer start(std::byte* target, cudaStream_t stream) {
    return engine_->start_load(request(target, CachePolicy::kDirect, stream));
  }
  void expect_behind_a_kernel(cudaStream_t kernel, cudaStream_t stream) {
    std::byte* const target = cuda().allocate(bytes_.size());
    cuda().start_kernel(kernel);
    Transfer transfer = start(target, stream);
    EXPECT_FALSE(transfer.wait_for(std::chrono::milliseconds(20)));
    EXPECT_TRUE(untouched(target));
    cuda().end_kernel(kernel);
    transfer.wait();
    EXPECT_TRUE(right(target));
  }
};

INSTANTIATE_TEST_SUITE_P(Backends, CudaGateTest, testing::kBackends, testing::backend_name);

TEST_P(CudaGateTest, AGraphIsCapturedUndisturbedByLoadsAndByNewEngines) {
  for (const cudaStreamCaptureMode mode : kCaptureModes) {
    SCOPED_TRACE(mode);
    const CallersStream capturing;
    const CallersStream stream;
    ASSERT_EQ(cudaStreamBeginCapture(capturing.stream, mode), cudaSuccess);
    for (cudaStream_t behind : {static_cast<cudaStream_t>(nullptr), stream.stream}) {
      std::byte* const target = cuda().allocate(bytes_.size());
      start(target, behind).wait();
      EXPECT_TRUE(right(target));
      std::thread([&] { start(target, behind).wait(); }).join();
    }
    start_engine();
    EXPECT_EQ(cuda().captured(capturing.stream), 0);
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(capturing.stream, &graph), cudaSuccess);
  }
}

TEST_P(CudaGateTest, AStreamThatIsCapturedIsRefusedAndTheGraphStaysWhole) {
  const CallersStream stream;
  std::byte* const target = cuda().allocate(bytes_.size());
  for (const cudaStreamCaptureMode mode : kCaptureModes) {
    ASSERT_EQ(cudaStreamBeginCapture(stream.stream, mode), cudaSuccess);
    const auto error = error_of([&] { start(target, stream.stream); });
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code(), Errc::kInvalidArgument) << error->what();
    EXPECT_EQ(cuda().captured(stream.stream), 0);
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(stream.stream, &graph), cudaSuccess);
  }
  start(target, stream.stream).wait();
  EXPECT_TRUE(right(target));
}

TEST_P(CudaGateTest, TheLegacyDefaultStreamIsRefusedWhileOneThatItWaitsForIsCaptured) {
  const BlockingStream capturing;
  const CallersStream stream;
  std::byte* const target = cuda().allocate(bytes_.size());
  ASSERT_EQ(cudaStreamBeginCapture(capturing.stream, cudaStreamCaptureModeRelaxed), cudaSuccess);
  const auto error = error_of([&] { start(target, nullptr); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), Errc::kInvalidArgument) << error->what();
  EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "left to the caller";
  start(target, stream.stream).wait();
  EXPECT_TRUE(right(target));
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(capturing.stream, &graph), cudaSuccess);
}

TEST_P(CudaGateTest, TargetsOnTheHostAskNothingOfAStream) {
  const CallersStream stream;
  ASSERT_EQ(cudaStreamBeginCapture(stream.stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  testing::GuardedMemory memory(bytes_.size());
  start(memory.data(), stream.stream).wait();
  EXPECT_EQ(cuda().touches(stream.stream), 0);
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(stream.stream, &graph), cudaSuccess);
}

TEST_P(CudaGateTest, TheLegacyDefaultStreamStandsForTheStreamsThatItWaitsFor) {
  const BlockingStream stream;
  expect_behind_a_kernel(stream.stream, nullptr);
  expect_behind_a_kernel(nullptr, nullptr);
}

TEST_P(CudaGateTest, ThePerThreadDefaultStreamIsTheCallingThreads) {
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  expect_behind_a_kernel(cudaStreamPerThread, cudaStreamPerThread);
}

TEST_P(CudaGateTest, MemoryOfAStreamOrderedAllocatorIsATargetBeforeItIsThere) {
  const CallersStream stream;
  cudaSetDevice(1);
  cuda().start_kernel(stream.stream);
  void* target = nullptr;
  ASSERT_EQ(cudaMallocAsync(&target, bytes_.size(), stream.stream), cudaSuccess);
  Transfer transfer = start(static_cast<std::byte*>(target), stream.stream);
  EXPECT_FALSE(transfer.wait_for(std::chrono::milliseconds(10)));
  cuda().end_kernel(stream.stream);
  transfer.wait();
  EXPECT_TRUE(right(static_cast<std::byte*>(target)));
  cudaFreeAsync(target, stream.stream);
  cuda().finish_all();
}

TEST_P(CudaGateTest, AnEventThatIsRecordedAndNeverAskedForGoesQuietly) {
  const CallersStream stream;
  cuda().start_kernel(stream.stream);
  Transfer transfer = start(cuda().allocate(bytes_.size()), stream.stream);
  transfer.cancel();
  ASSERT_TRUE(transfer.wait_for(testing::kHang));
  engine_.reset();  // The transfer's handle outlives it.
  EXPECT_EQ(cuda().live_events(), 0);
  cuda().end_kernel(stream.stream);
  cuda().finish_all();
}

}  // namespace
}  // namespace flashpack
