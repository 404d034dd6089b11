/// RAII for the CUDA runtime, and its errors. Only *_cuda.cc and gate_cuda.h include this.
///
/// make_stream(), make_event() and give_back() are the life of a handle, and a ContextGuard is what each call of the
/// runtime needs. taken() and check() wrap such a call; the other functions translate and look up.
///
/// Thread safety: any thread may call any function; the objects are for one thread at a time, except Context, which is
/// constant.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstddef>
#include <memory>
#include <span>
#include <system_error>

#include "flashpack/error.h"

namespace flashpack::internal::cuda {

inline std::error_code code_of(cudaError_t error) noexcept { return {static_cast<int>(error), cuda_category()}; }
/// Both enumerations have the same values.
inline cudaError_t error_of(CUresult result) noexcept { return static_cast<cudaError_t>(result); }

/// Returns the result of a call, and clears CUDA's last error of this thread, so that the caller's code, such as a
/// completion, does not take our error for its own. CUDA keeps an error that has ended the context.
inline cudaError_t taken(cudaError_t result) noexcept {
  if (result != cudaSuccess) static_cast<void>(cudaGetLastError());
  return result;
}

/// Throws: std::system_error.
inline void check(cudaError_t result, const char* call) {
  if (taken(result) != cudaSuccess) throw std::system_error(code_of(result), call);
}

/// Finds a function of the driver library, which is not linked. Without a current device this makes a context. Throws:
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

/// The primary context of a device. It is made current through the driver, because the runtime would make a context on
/// another device if none is current there, even when it only restores the previous device.
class Context {
 public:
  /// To be called on a thread of the engine; makes `device` current there. Throws: std::system_error.
  explicit Context(int device) {
    check(cudaSetDevice(device), "cudaSetDevice");
    push_ = driver_function<decltype(cuCtxPushCurrent)>("cuCtxPushCurrent");
    pop_ = driver_function<decltype(cuCtxPopCurrent)>("cuCtxPopCurrent");
    check(error_of(driver_function<decltype(cuCtxGetCurrent)>("cuCtxGetCurrent")(&context_)), "cuCtxGetCurrent");
    // Keeps the library loaded, because at the end of a process the runtime may close it before the engine's last call.
    static_cast<void>(::dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE));
  }

 private:
  friend class ContextGuard;
  CUcontext context_ = nullptr;
  decltype(&cuCtxPushCurrent) push_;
  decltype(&cuCtxPopCurrent) pop_;
};

/// Makes the engine's context current on this thread, and sets the relaxed capture mode, because otherwise a call could
/// break another thread's stream capture although it touches none of its streams. Restores both at the end.
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

  /// If this is an error, the context is not current and the runtime must not be called.
  cudaError_t error() const noexcept { return error_; }

 private:
  const Context& context_;
  const cudaError_t error_;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

struct StreamDeleter {
  void operator()(cudaStream_t stream) const noexcept { taken(cudaStreamDestroy(stream)); }
};
struct EventDeleter {
  void operator()(cudaEvent_t event) const noexcept { taken(cudaEventDestroy(event)); }
};
using Stream = std::unique_ptr<CUstream_st, StreamDeleter>;
using Event = std::unique_ptr<CUevent_st, EventDeleter>;

/// Destroys a handle in the guard's context, or forgets a handle whose context is gone.
template <class Handle>
void give_back(Handle& handle, const ContextGuard& guard) noexcept {
  if (guard.error() != cudaSuccess) static_cast<void>(handle.release());
  handle.reset();
}

/// Makes a stream of the current device that does not wait for the legacy default stream.
inline Stream make_stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  return Stream(stream);
}

/// Makes an event of the current device.
inline Event make_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return Event(event);
}

/// Page-locks memory for the copy engines of all devices, as long as this lives. The memory is registered with CUDA
/// rather than allocated by it, because it can then have huge pages, and io_uring can register it, too.
class PageLock {
 public:
  /// If `is_locked`, the memory's owner has locked it, and it is left as it is. Requires: `context`, which the lock
  /// belongs to, is current.
  PageLock(const Context& context, std::span<std::byte> memory, bool is_locked)
      : context_(context),
        memory_(is_locked ? std::span<std::byte>() : memory),
        error_(is_locked ? cudaSuccess
                         : taken(cudaHostRegister(memory.data(), memory.size(), cudaHostRegisterPortable))) {}
  ~PageLock() {
    if (error_ != cudaSuccess || memory_.empty()) return;
    const ContextGuard guard(context_);
    if (guard.error() == cudaSuccess)
      taken(cudaHostUnregister(memory_.data()));  // Else the lock is gone with its context.
  }
  PageLock(const PageLock&) = delete;
  PageLock& operator=(const PageLock&) = delete;

  cudaError_t error() const noexcept { return error_; }

 private:
  const Context context_;
  const std::span<std::byte> memory_;
  const cudaError_t error_;
};

}  // namespace flashpack::internal::cuda
