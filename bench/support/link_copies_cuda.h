/// Copies that measure the link to a CUDA device. Only programs with CUDA have them.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "bench/support/device_memory.h"

struct CUstream_st;

namespace flashpack::bench {

/// Page-locks memory for as long as it lives.
class LockedPages {
 public:
  explicit LockedPages(std::span<std::byte> memory);
  LockedPages(const LockedPages&) = delete;
  LockedPages& operator=(const LockedPages&) = delete;
  ~LockedPages();

  /// Whether the memory could be locked.
  explicit operator bool() const { return memory_ != nullptr; }

 private:
  std::byte* memory_;
};

/// Copies of `copy_bytes` from host memory to a device, dealt out to `streams` streams.
class LinkCopies {
 public:
  /// Both memories are borrowed, and the device's is at least as large. Its device is current on this thread. Throws:
  /// std::system_error of cuda_category(), as run() does.
  LinkCopies(const DeviceMemory& target, std::span<const std::byte> source, std::size_t copy_bytes, unsigned streams);

  /// Copies all of the source so many times, and waits for it.
  void run(std::size_t passes) const;

 private:
  struct Destroy {
    void operator()(CUstream_st* stream) const;
  };

  std::byte* target_;
  std::span<const std::byte> source_;
  std::size_t copy_bytes_;
  std::vector<std::unique_ptr<CUstream_st, Destroy>> streams_;
};

}  // namespace flashpack::bench
