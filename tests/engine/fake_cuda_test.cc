// The fake ends a program that does what is undefined behaviour in the real CUDA, so that a test cannot miss it.
#include "tests/support/fake_cuda.h"

#include <cuda.h>
#include <gtest/gtest.h>

#include <array>
#include <vector>

#include "engine/cuda_handles.h"

namespace flashpack {
namespace {

using testing::FakeCuda;

constexpr std::size_t kBytes = 4096;

class FakeCudaDeathTest : public ::testing::Test {
 protected:
  void SetUp() override {
    GTEST_FLAG_SET(death_test_style, "threadsafe");  // A forked child has no CUDA.
    FakeCuda::get().reset();
    cudaSetDevice(1);
    cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
    cudaHostRegister(host_.data(), host_.size(), cudaHostRegisterPortable);
    target_ = FakeCuda::get().allocate(kBytes);
  }
  void TearDown() override {
    FakeCuda::get().hold(false);
    FakeCuda::get().finish_all();
    cudaHostUnregister(host_.data());
    cudaStreamDestroy(stream_);
  }
  void copy() { cudaMemcpyAsync(target_, host_.data(), kBytes, cudaMemcpyHostToDevice, stream_); }

  cudaStream_t stream_ = nullptr;
  std::vector<std::byte> host_ = std::vector<std::byte>(kBytes);
  std::byte* target_ = nullptr;
};

TEST_F(FakeCudaDeathTest, MemoryIsUnregisteredWhileItIsCopied) {
  FakeCuda::get().hold(true);
  copy();
  EXPECT_DEATH(cudaHostUnregister(host_.data()), "misuse of CUDA: unregistering memory with copies under way");
}

TEST_F(FakeCudaDeathTest, AStreamIsDestroyedWithCopiesOnIt) {
  FakeCuda::get().hold(true);
  copy();
  EXPECT_DEATH(cudaStreamDestroy(stream_), "misuse of CUDA: destroying a stream with copies");
}

TEST_F(FakeCudaDeathTest, AContextIsUsedAfterAReset) {
  const internal::cuda::Context context(1);
  const auto use_after_reset = [&] {
    cudaDeviceReset();
    const internal::cuda::ContextGuard guard(context);
  };
  EXPECT_DEATH(use_after_reset(), "misuse of CUDA: a context that a cudaDeviceReset\\(\\) has destroyed");
}

TEST_F(FakeCudaDeathTest, AStreamIsUsedAfterAReset) {
  const auto use_after_reset = [&] {
    cudaDeviceReset();
    cudaStreamQuery(stream_);
  };
  EXPECT_DEATH(use_after_reset(), "misuse of CUDA: a stream that is none, or not any more");
}

TEST_F(FakeCudaDeathTest, ACopyGoesPastTheEndOfDeviceMemory) {
  const auto copy_too_much = [&] {
    cudaMemcpyAsync(target_ + 1, host_.data(), kBytes, cudaMemcpyHostToDevice, stream_);
    FakeCuda::get().finish_all();
  };
  EXPECT_DEATH(copy_too_much(), "misuse of CUDA: past the end of device memory");
}

#if CUDART_VERSION >= 13000
TEST_F(FakeCudaDeathTest, ABatchWritesTwiceToOnePlace) {
  const std::array<void*, 2> targets{target_, target_};
  const std::array<const void*, 2> sources{host_.data(), host_.data() + 100};
  const std::array<std::size_t, 2> sizes{100, 100};
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  std::size_t first = 0;
  EXPECT_DEATH(cudaMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(), 2, &attributes, &first, 1, stream_),
               "misuse of CUDA: a batch that writes twice to one place");
}
#endif

}  // namespace
}  // namespace flashpack
