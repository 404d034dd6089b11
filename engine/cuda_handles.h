/// RAII for the CUDA runtime, and its errors. For *_cuda.cc alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <span>
#include <system_error>
#include <utility>

#include "flashpack/error.h"

namespace flashpack::engine::cuda {

inline std::error_code code_of(cudaError_t error) noexcept { return {static_cast<int>(error), cuda_category()}; }

/// Throws: std::system_error.
inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // What is not sticky must not be found by the caller's next look.
  throw std::system_error(code_of(error), call);
}

/// Makes a device current for this thread, and gives the caller's back. Does nothing where it is current already,
/// because setting a device makes a context on it, which takes time and hundreds of megabytes.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  const int device_;
  int previous_ = 0;
};

struct StreamDeleter {
  void operator()(cudaStream_t stream) const noexcept { cudaStreamDestroy(stream); }
};
struct EventDeleter {
  void operator()(cudaEvent_t event) const noexcept { cudaEventDestroy(event); }
};
using Stream = std::unique_ptr<CUstream_st, StreamDeleter>;
using Event = std::unique_ptr<CUevent_st, EventDeleter>;

/// Of the current device, and in no order with the legacy default stream.
inline Stream make_stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  return Stream(stream);
}

/// Of the current device.
inline Event make_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return Event(event);
}

/// Memory that stays where it is for the copy engines, as long as this lives. Registered rather than allocated by CUDA,
/// because that takes huge pages, any kernel lets io_uring register it too, and it is several times faster.
class PageLock {
 public:
  explicit PageLock(std::span<std::byte> memory)
      : memory_(memory), error_(cudaHostRegister(memory.data(), memory.size(), cudaHostRegisterPortable)) {
    if (error_ != cudaSuccess) static_cast<void>(cudaGetLastError());
  }
  ~PageLock() {
    if (error_ == cudaSuccess) cudaHostUnregister(memory_.data());
  }
  PageLock(const PageLock&) = delete;
  PageLock& operator=(const PageLock&) = delete;

  cudaError_t error() const noexcept { return error_; }

 private:
  std::span<std::byte> memory_;
  cudaError_t error_;
};

}  // namespace flashpack::engine::cuda
