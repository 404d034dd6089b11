#include <stdexcept>
#include <string>

#include "bench/support/device_memory.h"

namespace flashpack::bench {

void require_cuda_device(int device) {
  throw std::runtime_error("cuda:" + std::to_string(device) + ": this program was built without CUDA");
}

DeviceMemory::DeviceMemory(int device, std::size_t) { require_cuda_device(device); }
DeviceMemory::~DeviceMemory() = default;
void DeviceMemory::clear() const {}
void DeviceMemory::copy_to(std::byte*) const {}

double link_gb_per_s(const DeviceMemory&, std::span<std::byte>) { return 0; }

}  // namespace flashpack::bench
