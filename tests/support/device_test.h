#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/fake_cuda.h"
#include "tests/support/hang.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack::testing {

inline FakeCuda& cuda() { return FakeCuda::get(); }

// A stream as a caller has them, by default on the engine's device.
struct CallersStream {
  explicit CallersStream(int device = 1) {
    cudaSetDevice(device);
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaSetDevice(0);
  }
  ~CallersStream() { cudaStreamDestroy(stream); }
  cudaStream_t stream = nullptr;
};

class DeviceTest : public ::testing::TestWithParam<Backend> {
 protected:
  DeviceTest() {
    cuda().reset();
    write_file(path_, bytes_);
    start_engine();
  }
  ~DeviceTest() override {
    engine_.reset();
    EXPECT_EQ(cuda().live_streams(), 0);
    EXPECT_EQ(cuda().live_events(), 0);
    EXPECT_EQ(cuda().registrations(), 0);
  }

  EngineOptions options() const {
    return {.device = {Device::Kind::kCuda, 1},
            .chunk_bytes = kMiB,
            .queue_depth = 4,
            .staging_bytes = 8 * kMiB,
            .workers = 2,
            .backend = GetParam()};
  }
  void start_engine() { engine_.emplace(options()); }

  LoadRequest request(std::byte* target, CachePolicy cache = CachePolicy::kDirect,
                      cudaStream_t stream = nullptr) const {
    return {.files = {{.path = path_, .extents = {{0, bytes_.size(), target}}}}, .cache = cache, .stream = stream};
  }

  bool right(const std::byte* target) const { return cuda().holds(target, bytes_); }
  bool untouched(const std::byte* target) const { return cuda().is_poison(target, bytes_.size()); }

  TempDir dir_;
  std::filesystem::path path_ = dir_ / "model";
  std::vector<std::byte> bytes_ = random_bytes(20 * kMiB + 1234);
  std::optional<Engine> engine_;
};

template <class Call>
std::optional<Error> error_of(Call call) {
  try {
    call();
    return std::nullopt;
  } catch (const Error& error) {
    return error;
  }
}

inline const auto kBackends = ::testing::Values(Backend::kAuto, Backend::kWorkers);
inline std::string backend_name(const ::testing::TestParamInfo<Backend>& backend) {
  return backend.param == Backend::kAuto ? "Auto" : "Workers";
}

}  // namespace flashpack::testing
