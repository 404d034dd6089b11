#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <system_error>

#include "bench/support/device_memory.h"
#include "bench/support/link_copies_cuda.h"
#include "bench/support/measure.h"
#include "engine/ground/units.h"
#include "flashpack/error.h"

namespace flashpack::bench {

namespace {

using internal::kMiB;
constexpr std::size_t kMostLockedBytes = 256 * kMiB;
constexpr std::size_t kCopyBytes = 16 * kMiB;
constexpr std::size_t kStreams = 2;  // As many as the engine has.
constexpr int kRounds = 5;
constexpr std::size_t kBytesOfRound = kMostLockedBytes;

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::system_error(static_cast<int>(error), cuda_category(), call);
}

}  // namespace

void require_cuda_device(int device) {
  const std::string name = "cuda:" + std::to_string(device) + ": ";
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) throw std::runtime_error(name + "no usable CUDA device: " + cudaGetErrorString(error));
  if (device >= count)
    throw std::runtime_error(name + "there is no such device, and the number of CUDA devices here is " +
                             std::to_string(count));
}

DeviceMemory::DeviceMemory(int device, std::size_t size_bytes) {
  require_cuda_device(device);
  check(cudaSetDevice(device), "cudaSetDevice");
  void* memory = nullptr;
  check(cudaMalloc(&memory, size_bytes), "cudaMalloc");
  memory_ = {static_cast<std::byte*>(memory), size_bytes};
}

DeviceMemory::~DeviceMemory() { cudaFree(memory_.data()); }

void DeviceMemory::clear() const {
  check(cudaMemset(memory_.data(), 0xAB, memory_.size()), "cudaMemset");
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

void DeviceMemory::copy_to(std::byte* host) const {
  check(cudaMemcpy(host, memory_.data(), memory_.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
}

double link_gb_per_s(const DeviceMemory& target, std::span<std::byte> source) {
  const std::size_t size_bytes = std::min({source.size(), target.size_bytes(), kMostLockedBytes});
  const LockedPages locked(source.first(size_bytes));
  if (!locked) return 0;
  const LinkCopies copies(target, source.first(size_bytes), kCopyBytes, kStreams);
  const std::size_t passes = 1 + (kBytesOfRound - 1) / size_bytes;
  const auto copy = [&] { copies.run(passes); };
  copy();  // The first copies are slower.
  double least_s = measure(copy).seconds;
  for (int round = 1; round < kRounds; ++round) least_s = std::min(least_s, measure(copy).seconds);
  return static_cast<double>(size_bytes * passes) / least_s / 1e9;
}

}  // namespace flashpack::bench
