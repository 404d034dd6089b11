// The device path on a real GPU. Skipped without one, which fails where FLASHPACK_REQUIRE_GPU=1 says that there is one.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

constexpr std::uint32_t kMiB = 1u << 20;

TEST(DeviceOfAnEngine, ThatIsNotThereIsAClearError) {
  try {
    Engine engine({.device = {Device::Kind::kCuda, 9999}});
    FAIL() << "an engine for device 9999";
  } catch (const Error& error) {
    EXPECT_NE(std::string_view(error.what()).find("cuda"), std::string_view::npos) << error.what();
  }
}

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count > 0) {
      ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
      return;
    }
    const char* required = std::getenv("FLASHPACK_REQUIRE_GPU");
    if (required != nullptr && std::string_view(required) == "1") {
      FAIL() << "FLASHPACK_REQUIRE_GPU=1, but: " << cudaGetErrorString(error);
    }
    GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  }
  void TearDown() override {
    if (stream_ != nullptr) {
      EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
    }
  }

  // Memory of a stream-ordered allocator: nobody may touch it before the stream has come to the allocation.
  std::byte* allocate(std::size_t size_bytes) {
    void* memory = nullptr;
    EXPECT_EQ(cudaMallocAsync(&memory, size_bytes, stream_), cudaSuccess);
    EXPECT_EQ(cudaMemsetAsync(memory, 0xAB, size_bytes, stream_), cudaSuccess);
    return static_cast<std::byte*>(memory);
  }
  std::vector<std::byte> take(std::byte* memory, std::size_t size_bytes) {
    std::vector<std::byte> bytes(size_bytes);
    EXPECT_EQ(cudaMemcpyAsync(bytes.data(), memory, size_bytes, cudaMemcpyDeviceToHost, stream_), cudaSuccess);
    EXPECT_EQ(cudaFreeAsync(memory, stream_), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    return bytes;
  }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "model";
  std::vector<std::byte> bytes_ = testing::random_bytes(100 * kMiB + 1234);
  cudaStream_t stream_ = nullptr;
};

TEST_F(GpuTest, EveryRouteBringsTheBytesBehindWhatTheStreamHasToDo) {
  testing::write_file(path_, bytes_);
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered, CachePolicy::kAuto}) {
    std::byte* target = allocate(bytes_.size());
    const TransferStats stats = engine.load(
        {.files = {{.path = path_, .extents = {{0, bytes_.size(), target}}}}, .cache = cache, .stream = stream_});
    EXPECT_TRUE(stats.pinned);
    EXPECT_EQ(take(target, bytes_.size()), bytes_);
  }
}

TEST_F(GpuTest, SmallTensorsAtOddPlacesArriveInBatches) {
  testing::write_file(path_, bytes_);
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  std::byte* target = allocate(bytes_.size());
  FileExtents file{.path = path_};
  std::vector<std::byte> expected(bytes_.size(), std::byte{0xAB});
  for (std::uint64_t at = 1; at + 5000 < bytes_.size(); at += 7919) {
    const std::uint64_t size = 1 + at % 4999;
    file.extents.push_back({at, size, target + at});
    std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(at), size,
                expected.begin() + static_cast<std::ptrdiff_t>(at));
  }
  engine.load({.files = {file}, .stream = stream_});
  EXPECT_EQ(take(target, bytes_.size()), expected);
}

TEST_F(GpuTest, AStoreWritesWhatTheStreamHasPutThere) {
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  std::byte* source = allocate(bytes_.size());
  ASSERT_EQ(cudaMemcpyAsync(source, bytes_.data(), bytes_.size(), cudaMemcpyHostToDevice, stream_), cudaSuccess);
  FileWriter writer = engine.create(path_, {.payload_bytes = bytes_.size()});
  writer.write({{0, bytes_.size(), source}}, stream_);
  writer.commit({});
  EXPECT_EQ(testing::read_file(path_), bytes_);
  take(source, bytes_.size());
}

}  // namespace
}  // namespace flashpack
