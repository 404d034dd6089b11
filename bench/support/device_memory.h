/// Memory of a CUDA device and the link to it, for what measures loads there. Programs that are built without CUDA have
/// these functions, too, and each of them throws there.
#pragma once

#include <cstddef>
#include <span>

namespace flashpack::bench {

/// Throws: std::runtime_error, which names the device, unless this program and this machine have it.
void require_cuda_device(int device);

/// Owns memory of a CUDA device.
class DeviceMemory {
 public:
  /// Makes `device` current on this thread. Throws: as require_cuda_device(); std::system_error of cuda_category().
  DeviceMemory(int device, std::size_t size_bytes);
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory();

  std::byte* data() const { return memory_.data(); }
  std::size_t size_bytes() const { return memory_.size(); }
  /// Overwrites the memory, so that bytes of an earlier load are not taken for those of a later one. Throws:
  /// std::system_error.
  void clear() const;
  /// Copies all of it to `host`. Throws: std::system_error.
  void copy_to(std::byte* host) const;

 private:
  std::span<std::byte> memory_;
};

/// The speed of the link to the device in GB/s: copies of page-locked memory on two streams, the fastest of some
/// rounds. At most 256 MiB of `source` are page-locked meanwhile; the result is 0 if they cannot be. The device of
/// `target` is current on this thread. Throws: std::system_error.
double link_gb_per_s(const DeviceMemory& target, std::span<std::byte> source);

}  // namespace flashpack::bench
