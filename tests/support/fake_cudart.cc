// The functions of the runtime, and those of the driver that it leads to. Each gives what it was told to give, or does
// its work.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/support/bulk.h"
#include "tests/support/fake_cuda_impl.h"

using flashpack::testing::copy_bytes;
using flashpack::testing::FakeCuda;
using flashpack::testing::find_more_in_driver;
using flashpack::testing::Inside;
using flashpack::testing::require;
using flashpack::testing::Work;
using Kind = FakeCuda::Impl::Kind;

namespace {

// Until the stream is empty, or gone.
cudaError_t wait_for(cudaStream_t handle) {
  while (true) {
    {
      Inside impl;
      if (impl->unloading) return impl->note(cudaErrorCudartUnloading);
      CUstream_st& stream = *impl->stream_of(handle, impl->context());
      impl->do_some();
      if (stream.queue.empty()) return cudaSuccess;
    }
    std::this_thread::yield();
  }
}

CUresult driver_error(cudaError_t error) { return static_cast<CUresult>(error); }

CUresult push_context(CUcontext context) {
  Inside impl;
  if (const auto error = impl->enter("cuCtxPushCurrent", Kind::kNoContext)) return driver_error(error);
  require(!context || !context->was_reset, "a context that a cudaDeviceReset() has destroyed");
  if (!context || !context->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  impl->thread().contexts.push_back(context);
  return CUDA_SUCCESS;
}

CUresult pop_context(CUcontext* context) {
  Inside impl;
  if (const auto error = impl->enter("cuCtxPopCurrent", Kind::kNoContext)) return driver_error(error);
  auto& stack = impl->thread().contexts;
  if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = stack.back();
  stack.pop_back();
  return CUDA_SUCCESS;
}

CUresult current_context(CUcontext* context) {
  Inside impl;
  if (const auto error = impl->enter("cuCtxGetCurrent", Kind::kNoContext)) return driver_error(error);
  const auto& stack = impl->thread().contexts;
  *context = stack.empty() ? nullptr : stack.back();
  return CUDA_SUCCESS;
}

cudaError_t find_in_driver(const char* symbol, void** function, cudaDriverEntryPointQueryResult* result) {
  const std::string name = symbol;
  *function = name == "cuCtxPushCurrent"  ? reinterpret_cast<void*>(&push_context)
              : name == "cuCtxPopCurrent" ? reinterpret_cast<void*>(&pop_context)
              : name == "cuCtxGetCurrent" ? reinterpret_cast<void*>(&current_context)
              : find_more_in_driver       ? find_more_in_driver(name)
                                          : nullptr;
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t make_stream(const char* function, cudaStream_t* stream, bool blocking) {
  Inside impl;
  if (const auto error = impl->enter(function, Kind::kSafe)) return error;
  *stream = *impl->streams.insert(new CUstream_st{.context = &impl->context(), .blocking = blocking}).first;
  return cudaSuccess;
}

#if CUDART_VERSION >= 12080
// Checks the arguments by the rules in the documentation of cudaMemcpyBatchAsync, because the real call refuses others.
bool is_valid_batch(std::size_t count, std::span<const cudaMemcpyAttributes> attributes,
                    std::span<const std::size_t> firsts, cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy || count == 0 || attributes.empty()) return false;
  if (attributes.size() > count || firsts.front() != 0 || firsts.back() >= count) return false;
  const bool rising = std::adjacent_find(firsts.begin(), firsts.end(), std::greater_equal()) == firsts.end();
  return rising && std::all_of(attributes.begin(), attributes.end(), [](const cudaMemcpyAttributes& a) {
           return a.srcAccessOrder > cudaMemcpySrcAccessOrderInvalid && a.srcAccessOrder <= cudaMemcpySrcAccessOrderAny;
         });
}

// In any order, because a batch has none.
cudaError_t copy_batch(void* const* targets, const void* const* sources, const std::size_t* sizes, std::size_t count,
                       std::span<const cudaMemcpyAttributes> attributes, std::span<const std::size_t> firsts,
                       cudaStream_t handle) {
  Inside impl;
  if (const auto error = impl->enter("cudaMemcpyBatchAsync", Kind::kSafe)) return error;
  if (!is_valid_batch(count, attributes, firsts, handle)) return impl->note(cudaErrorInvalidValue);
  CUstream_st& stream = *impl->stream_of(handle, impl->context());
  require(stream.context == &impl->context(), "a batch on a stream of another context");
  for (const cudaMemcpyAttributes& each : attributes) {
    require(each.srcAccessOrder == cudaMemcpySrcAccessOrderStream, "slots are read in the order of the stream");
  }
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), impl->random);
  std::set<void*> written;
  for (const std::size_t i : order) {
    require(sizes[i] > 0, "an empty copy in a batch");
    require(written.insert(targets[i]).second, "a batch that writes twice to one place");
    require(impl->registered(impl->region_of(targets[i]) ? sources[i] : targets[i], sizes[i], impl->context()),
            "a batch with memory that is not locked");
    if (const auto error = impl->copy(stream, targets[i], sources[i], sizes[i])) return error;
  }
  return cudaSuccess;
}
#endif

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  Inside impl;
  if (const auto error = impl->enter("cudaGetDeviceCount", Kind::kNoContext)) return error;
  *count = impl->devices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  Inside impl;
  if (const auto error = impl->enter("cudaGetDevice", Kind::kNoContext)) return error;
  const auto& thread = impl->thread();
  *device = thread.contexts.empty() ? thread.device : thread.contexts.back()->device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  Inside impl;
  if (const auto error = impl->enter("cudaSetDevice", Kind::kNoContext)) return error;
  if (device < 0 || device >= impl->devices) return impl->note(cudaErrorInvalidDevice);
  auto& thread = impl->thread();
  thread.device = device;
  if (!thread.contexts.empty()) thread.contexts.pop_back();
  thread.contexts.push_back(&impl->primary(device));
  return cudaSuccess;
}

cudaError_t cudaDeviceReset() {
  Inside impl;
  if (const auto error = impl->enter("cudaDeviceReset", Kind::kUnsafe)) return error;
  impl->destroy(impl->context());
  impl->context().was_reset = true;
  impl->thread().contexts.pop_back();
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int) {
  Inside impl;
  if (const auto error = impl->enter("cudaDeviceGetPCIBusId", Kind::kNoContext)) return error;
  std::snprintf(text, static_cast<std::size_t>(size), "0000:FF:1F.7");
  return cudaSuccess;
}

#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  Inside impl;
  if (const auto error = impl->enter("cudaGetDriverEntryPoint", Kind::kSafe)) return error;
  require(version == 12000, "a function that an older driver may lack");
  return find_in_driver(symbol, function, result);
}
#else
cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* result) {
  Inside impl;
  if (const auto error = impl->enter("cudaGetDriverEntryPoint", Kind::kSafe)) return error;
  return find_in_driver(symbol, function, result);
}
#endif

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return make_stream("cudaStreamCreate", stream, true); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  require(flags == cudaStreamNonBlocking, "a stream that waits for the legacy default stream");
  return make_stream("cudaStreamCreateWithFlags", stream, false);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Inside impl;
  if (impl->enter("cudaStreamDestroy", Kind::kUnsafe) == cudaErrorCudartUnloading) return cudaErrorCudartUnloading;
  require(impl->streams.erase(stream) == 1, "destroying a stream that is none");
  const bool idle = std::all_of(stream->queue.begin(), stream->queue.end(),
                                [](const Work& work) { return work.kind == Work::Kind::kQuick; });
  require(idle || stream->context->sticky != cudaSuccess, "destroying a stream with copies or kernels on it");
  impl->finish(*stream);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Inside impl;
  if (const auto error = impl->enter("cudaStreamQuery", Kind::kUnsafe)) return error;
  CUstream_st& stream = *impl->stream_of(handle, impl->context());
  impl->do_some();
  return stream.queue.empty() ? cudaSuccess : impl->note(cudaErrorNotReady);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (const auto error = Inside()->enter("cudaStreamSynchronize", Kind::kUnsafe)) return error;
  return wait_for(stream);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  Inside impl;
  if (const auto error = impl->enter("cudaThreadExchangeStreamCaptureMode", Kind::kSafe)) return error;
  std::swap(impl->thread().mode, *mode);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Inside impl;
  if (const auto error = impl->enter("cudaStreamBeginCapture", Kind::kSafe)) return error;
  CUstream_st& stream = *impl->stream_of(handle, impl->context());
  if (&stream == &stream.context->legacy) return impl->note(cudaErrorStreamCaptureUnsupported);
  stream.capture = {.mode = mode, .thread = std::this_thread::get_id()};
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Inside impl;
  if (const auto error = impl->enter("cudaStreamEndCapture", Kind::kSafe)) return error;
  CUstream_st& stream = *impl->stream_of(handle, impl->context());
  *graph = nullptr;
  const auto capture = std::exchange(stream.capture, {});
  if (capture->broken) return impl->note(cudaErrorStreamCaptureInvalidated);
  *graph = &impl->graphs.emplace_back(capture->graph);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Inside impl;
  if (const auto error = impl->enter("cudaStreamIsCapturing", Kind::kSafe)) return error;
  CUstream_st& stream = *impl->stream_of(handle, impl->context());
  for (const CUstream_st* other : impl->all_streams()) {
    const bool waited_for = other->context == stream.context && other->blocking && other->capture;
    if (waited_for && &stream == &stream.context->legacy) return impl->note(cudaErrorStreamCaptureImplicit);
  }
  *status = !stream.capture          ? cudaStreamCaptureStatusNone
            : stream.capture->broken ? cudaStreamCaptureStatusInvalidated
                                     : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  Inside impl;
  if (const auto error = impl->enter("cudaEventCreateWithFlags", Kind::kSafe)) return error;
  require(flags & cudaEventDisableTiming, "an event that takes the time, which costs");
  *event = *impl->events.insert(new CUevent_st{.context = &impl->context()}).first;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Inside impl;
  if (impl->enter("cudaEventDestroy", Kind::kUnsafe) == cudaErrorCudartUnloading) return cudaErrorCudartUnloading;
  require(impl->events.erase(event) == 1, "destroying an event that is none");
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  Inside impl;
  if (const auto error = impl->enter("cudaEventRecord", Kind::kSafe)) return error;
  CUstream_st& stream = *impl->stream_of(handle, impl->context());
  require(impl->events.contains(event), "recording an event that is none");
  if (stream.context != event->context) return impl->note(cudaErrorInvalidResourceHandle);
  event->captured = stream.capture.has_value();
  event->done = false;
  const auto land = [&impl = *impl, event, record = event->record = ++impl->records] {
    if (impl.events.contains(event) && event->record == record) event->done = true;
  };
  return impl->queue(stream, {.kind = Work::Kind::kQuick, .act = land});
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  Inside impl;
  if (const auto error = impl->enter("cudaEventQuery", Kind::kUnsafe)) return error;
  require(impl->events.contains(event), "asking for an event that is none");
  if (event->captured) return impl->note(cudaErrorCapturedEvent);
  impl->do_some();
  return event->done ? cudaSuccess : impl->note(cudaErrorNotReady);
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t size_bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  {
    Inside impl;
    if (const auto error = impl->enter("cudaMemcpyAsync", Kind::kSafe)) return error;
    if (kind == cudaMemcpyDefault || kind == cudaMemcpyDeviceToDevice) {  // The caller's own.
      const auto land = [&impl = *impl, target, source, size_bytes] {
        copy_bytes(impl.reachable(target, size_bytes), impl.reachable(source, size_bytes), size_bytes);
      };
      return impl->queue(*impl->stream_of(stream, impl->context()), {.kind = Work::Kind::kQuick, .act = land});
    }
    require(kind == (impl->region_of(target) ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost),
            "a copy in the wrong direction");
    if (const auto error = impl->copy(*impl->stream_of(stream, impl->context()), target, source, size_bytes)) {
      return error;
    }
    if (impl->registered(impl->region_of(target) ? source : target, size_bytes, impl->context())) return cudaSuccess;
    if (impl->region_of(target) && impl->random() % 2 == 0) return cudaSuccess;
  }
  return wait_for(stream);
}

#if CUDART_VERSION >= 13000
cudaError_t cudaMemcpyBatchAsync(void* const* targets, const void* const* sources, const std::size_t* sizes,
                                 std::size_t count, cudaMemcpyAttributes* attributes, std::size_t* first_of_attributes,
                                 std::size_t attribute_count, cudaStream_t stream) {
  return copy_batch(targets, sources, sizes, count, {attributes, attribute_count},
                    {first_of_attributes, attribute_count}, stream);
}
#elif CUDART_VERSION >= 12080
cudaError_t cudaMemcpyBatchAsync(void** targets, void** sources, std::size_t* sizes, std::size_t count,
                                 cudaMemcpyAttributes* attributes, std::size_t* first_of_attributes,
                                 std::size_t attribute_count, std::size_t* failed, cudaStream_t stream) {
  require(failed != nullptr, "a batch without a place for the one that failed");
  return copy_batch(targets, sources, sizes, count, {attributes, attribute_count},
                    {first_of_attributes, attribute_count}, stream);
}
#endif

cudaError_t cudaMallocAsync(void** memory, std::size_t size_bytes, cudaStream_t handle) {
  Inside impl;
  if (const auto error = impl->enter("cudaMallocAsync", Kind::kSafe)) return error;
  CUstream_st& stream = *impl->stream_of(handle, impl->context());
  *memory = impl->map(size_bytes, stream.context->device, false);
  impl->regions.back().there = false;
  const auto allocate = [&impl = *impl, at = *memory] { impl.region_of(at)->there = true; };
  return impl->queue(stream, {.kind = Work::Kind::kQuick, .act = allocate});
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t handle) {
  Inside impl;
  if (const auto error = impl->enter("cudaFreeAsync", Kind::kSafe)) return error;
  const auto free = [&impl = *impl, memory] { impl.region_of(memory)->there = false; };
  return impl->queue(*impl->stream_of(handle, impl->context()), {.kind = Work::Kind::kQuick, .act = free});
}

cudaError_t cudaMallocManaged(void** memory, std::size_t size_bytes, unsigned) {
  Inside impl;
  if (const auto error = impl->enter("cudaMallocManaged", Kind::kUnsafe)) return error;
  *memory = impl->map(size_bytes, impl->context().device, true);
  return cudaSuccess;
}

// Page-locked memory is there, and the device may write to it, unless it was told that it must not.
cudaError_t cudaHostRegister(void* memory, std::size_t size_bytes, unsigned flags) {
  Inside impl;
  if (const auto error = impl->enter("cudaHostRegister", Kind::kUnsafe)) return error;
  if (!memory || size_bytes == 0) return impl->note(cudaErrorInvalidValue);
  if (impl->registration_near(memory, size_bytes)) return impl->note(cudaErrorHostMemoryAlreadyRegistered);
  const auto begin = reinterpret_cast<std::uintptr_t>(memory) / 4096 * 4096;
  const std::size_t pages_bytes = reinterpret_cast<std::uintptr_t>(memory) + size_bytes - begin;
  const int access = flags & cudaHostRegisterReadOnly ? MADV_POPULATE_READ : MADV_POPULATE_WRITE;
  if (::madvise(reinterpret_cast<void*>(begin), pages_bytes, access) != 0) return impl->note(cudaErrorInvalidValue);
  impl->registrations[static_cast<std::byte*>(memory)] = {size_bytes, &impl->context(),
                                                          (flags & cudaHostRegisterPortable) != 0};
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* memory) {
  Inside impl;
  const cudaError_t error = impl->enter("cudaHostUnregister", Kind::kUnsafe);
  if (error == cudaErrorCudartUnloading) return error;
  const auto found = impl->registrations.find(static_cast<std::byte*>(memory));
  require(found != impl->registrations.end(), "unregistering what is not registered");
  require(error != cudaSuccess || !impl->is_being_copied({found->first, found->second.size_bytes}),
          "unregistering memory with copies under way");
  unsigned char resident = 0;
  std::byte* const page = found->first - reinterpret_cast<std::uintptr_t>(found->first) % 4096;
  require(::mincore(page, 1, &resident) == 0, "unregistering memory that is not there any more");
  impl->registrations.erase(found);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  Inside impl;
  if (const auto error = impl->enter("cudaPointerGetAttributes", Kind::kSafe)) return error;
  const auto* region = impl->region_of(memory);
  const auto* registration = impl->registration_near(memory, 1);
  const bool on_device = region && !region->managed;
  *attributes = {};
  attributes->device = region ? region->device : registration ? registration->context->device : cudaInvalidDeviceId;
  attributes->devicePointer = region || registration ? const_cast<void*>(memory) : nullptr;
  attributes->hostPointer = on_device ? nullptr : const_cast<void*>(memory);
  attributes->type = on_device      ? cudaMemoryTypeDevice
                     : region       ? cudaMemoryTypeManaged
                     : registration ? cudaMemoryTypeHost
                                    : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  Inside impl;
  auto& thread = impl->thread();
  const bool failed = !thread.contexts.empty() && thread.contexts.back()->sticky != cudaSuccess;
  return std::exchange(thread.last_error, failed ? thread.contexts.back()->sticky : cudaSuccess);
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorCallRequiresNewerDriver:
      return "cudaErrorCallRequiresNewerDriver";
    case cudaErrorContextIsDestroyed:
      return "cudaErrorContextIsDestroyed";
    case cudaErrorCudartUnloading:
      return "cudaErrorCudartUnloading";
    case cudaErrorHostMemoryAlreadyRegistered:
      return "cudaErrorHostMemoryAlreadyRegistered";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorOperatingSystem:
      return "cudaErrorOperatingSystem";
    default:
      return "cudaErrorUnknown";
  }
}

const char* cudaGetErrorString(cudaError_t) { return "as the test wished"; }

}  // extern "C"
