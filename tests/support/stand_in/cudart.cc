// What only tests ask of the CUDA runtime, over the fake one: memory of a device, and what is done to it at once.
#include <cuda_runtime_api.h>

#include <vector>

#include "tests/support/fake_cuda.h"

using flashpack::testing::FakeCuda;

extern "C" {

cudaError_t cudaMallocAsync(void** memory, std::size_t size_bytes, cudaStream_t) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  *memory = FakeCuda::get().allocate(size_bytes, device);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t size_bytes, cudaStream_t) {
  FakeCuda::get().write(static_cast<std::byte*>(memory),
                        std::vector<std::byte>(size_bytes, static_cast<std::byte>(value)));
  return cudaSuccess;
}

cudaError_t cudaFreeAsync(void*, cudaStream_t) { return cudaSuccess; }

}  // extern "C"
