#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string_view>

namespace flashpack::testing {

/// For SetUp(): skips the test without a CUDA device, or fails it where FLASHPACK_REQUIRE_GPU=1 says that there is one.
inline void require_gpu() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return;
  const char* required = std::getenv("FLASHPACK_REQUIRE_GPU");
  if (required != nullptr && std::string_view(required) == "1") {
    FAIL() << "FLASHPACK_REQUIRE_GPU=1, but: " << cudaGetErrorString(error);
  }
  GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
}

}  // namespace flashpack::testing
