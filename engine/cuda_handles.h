/// RAII for the CUDA runtime, and its errors. For *_cuda.cc alone.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstddef>
#include <memory>
#include <span>
#include <system_error>
#include <utility>

#include "flashpack/error.h"

namespace flashpack::internal::cuda {

inline std::error_code code_of(cudaError_t error) noexcept { return {static_cast<int>(error), cuda_category()}; }
/// The numbers are the same.
inline cudaError_t error_of(CUresult result) noexcept { return static_cast<cudaError_t>(result); }

/// Throws: std::system_error.
inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // What is not sticky must not be found by the caller's next look.
  throw std::system_error(code_of(error), call);
}

/// Takes a function of the driver, which is not linked. Requires: a current device, or this makes a context. Throws:
/// std::system_error.
template <class Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
#else
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result), name);
#endif
  check(found ? cudaSuccess : cudaErrorSymbolNotFound, name);
  return reinterpret_cast<Function*>(found);
}

/// The primary context of a device, and how it becomes current without one being made on another device: the runtime
/// makes one wherever nothing is current, also to give back what was current before.
class Context {
 public:
  /// On a thread of the engine's own, whose current device this becomes. Throws: std::system_error.
  explicit Context(int device) {
    check(cudaSetDevice(device), "cudaSetDevice");
    push_ = driver_function<decltype(cuCtxPushCurrent)>("cuCtxPushCurrent");
    pop_ = driver_function<decltype(cuCtxPopCurrent)>("cuCtxPopCurrent");
    check(error_of(driver_function<decltype(cuCtxGetCurrent)>("cuCtxGetCurrent")(&context_)), "cuCtxGetCurrent");
    // At the end of a process the runtime may close it, and the engine may still ask.
    static_cast<void>(::dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE));
  }

 private:
  friend class ContextGuard;
  CUcontext context_ = nullptr;
  decltype(&cuCtxPushCurrent) push_;
  decltype(&cuCtxPopCurrent) pop_;
};

/// A thread at work for the engine: in its context, and exempt from the rules for threads beside a stream capture,
/// which would break the capture for what touches none of its streams. Gives both back.
class ContextGuard {
 public:
  explicit ContextGuard(const Context& context) noexcept
      : context_(context), error_(error_of(context.push_(context.context_))) {
    if (error_ == cudaSuccess) cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  ~ContextGuard() {
    if (error_ != cudaSuccess) return;
    cudaThreadExchangeStreamCaptureMode(&mode_);
    CUcontext popped = nullptr;
    context_.pop_(&popped);
  }
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

  /// When there is one, the context is not current, and the runtime must be left alone.
  cudaError_t error() const noexcept { return error_; }

 private:
  const Context& context_;
  const cudaError_t error_;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

struct StreamDeleter {
  void operator()(cudaStream_t stream) const noexcept { cudaStreamDestroy(stream); }
};
struct EventDeleter {
  void operator()(cudaEvent_t event) const noexcept { cudaEventDestroy(event); }
};
using Stream = std::unique_ptr<CUstream_st, StreamDeleter>;
using Event = std::unique_ptr<CUevent_st, EventDeleter>;

/// In the guard's context; a handle that went with the context is forgotten.
template <class Handle>
void give_back(Handle& handle, const ContextGuard& guard) noexcept {
  if (guard.error() != cudaSuccess) static_cast<void>(handle.release());
  handle.reset();
}

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
    if (error_ == cudaSuccess && !memory_.empty()) cudaHostUnregister(memory_.data());
  }
  PageLock(const PageLock&) = delete;
  PageLock& operator=(const PageLock&) = delete;

  cudaError_t error() const noexcept { return error_; }
  /// It went with its context.
  void forget() noexcept { memory_ = {}; }

 private:
  std::span<std::byte> memory_;
  const cudaError_t error_;
};

}  // namespace flashpack::internal::cuda
