// The calls of the CUDA runtime that the tests of a real GPU make and the engine does not, over the fake one.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/support/fake_cuda_impl.h"

using flashpack::testing::FakeCuda;
using flashpack::testing::Inside;
using flashpack::testing::Work;
using Kind = FakeCuda::Impl::Kind;

struct CUgraphExec_st {
  std::vector<Work> works;
};

namespace {

constexpr std::size_t kGranularity = std::size_t{2} << 20;
std::map<CUdeviceptr, std::byte*> reserved;  // And where the fake itself sees it. Protected by the fake.

CUresult primary_context_state(CUdevice device, unsigned* flags, int* active) {
  Inside impl;
  *flags = 0;
  *active = impl->contexts[static_cast<std::size_t>(device)].alive;
  return CUDA_SUCCESS;
}

CUresult granularity(std::size_t* bytes, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *bytes = kGranularity;
  return CUDA_SUCCESS;
}

CUresult reserve(CUdeviceptr* address, std::size_t size_bytes, std::size_t, CUdeviceptr, unsigned long long) {
  Inside impl;
  const auto map = [&] { return ::mmap(nullptr, size_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); };
  *address = reinterpret_cast<CUdeviceptr>(map());
  reserved[*address] = static_cast<std::byte*>(map());
  return CUDA_SUCCESS;
}

CUresult create(CUmemGenericAllocationHandle* handle, std::size_t, const CUmemAllocationProp*, unsigned long long) {
  *handle = 1;
  return CUDA_SUCCESS;
}

CUresult map_memory(CUdeviceptr at, std::size_t size_bytes, std::size_t, CUmemGenericAllocationHandle,
                    unsigned long long) {
  Inside impl;
  const auto& [begin, shadow] = *std::prev(reserved.upper_bound(at));
  impl->map(size_bytes, 0, false, reinterpret_cast<std::byte*>(at), shadow + (at - begin));
  return CUDA_SUCCESS;
}

CUresult release(CUmemGenericAllocationHandle) { return CUDA_SUCCESS; }
CUresult set_access(CUdeviceptr, std::size_t, const CUmemAccessDesc*, std::size_t) { return CUDA_SUCCESS; }

CUresult unmap(CUdeviceptr at, std::size_t size_bytes) {
  Inside impl;
  std::erase_if(impl->regions, [&](const FakeCuda::Impl::Region& region) {
    const auto begin = reinterpret_cast<CUdeviceptr>(region.address);
    return begin >= at && begin < at + size_bytes;
  });
  return CUDA_SUCCESS;
}

CUresult give_back(CUdeviceptr at, std::size_t size_bytes) {
  Inside impl;
  ::munmap(reinterpret_cast<void*>(at), size_bytes);
  ::munmap(reserved[at], size_bytes);
  reserved.erase(at);
  return CUDA_SUCCESS;
}

// On its own thread, when the stream has come to it.
void run_on_host(FakeCuda::Impl& impl, CUstream_st& stream, cudaHostFn_t function, void* data) {
  impl.queue(stream, {.kind = Work::Kind::kKernel});
  std::thread([&stream, function, data, number = stream.queue.back().number] {
    const auto first = [&] {
      Inside inside;
      inside->do_some();
      return stream.queue.front().number == number;
    };
    while (!first()) std::this_thread::yield();
    function(data);
    Inside inside;
    stream.queue.pop_front();
  }).detach();
}

cudaError_t allocate(const char* function, void** memory, std::size_t size_bytes) {
  Inside impl;
  if (const auto error = impl->enter(function, Kind::kUnsafe)) return error;
  *memory = impl->map(size_bytes, impl->context().device, false);
  return cudaSuccess;
}

}  // namespace

namespace flashpack::testing {

void* find_more_in_driver(const std::string& name) {
  static const std::map<std::string, void*> functions{
      {"cuDevicePrimaryCtxGetState", reinterpret_cast<void*>(&primary_context_state)},
      {"cuMemAddressFree", reinterpret_cast<void*>(&give_back)},
      {"cuMemAddressReserve", reinterpret_cast<void*>(&reserve)},
      {"cuMemCreate", reinterpret_cast<void*>(&create)},
      {"cuMemGetAllocationGranularity", reinterpret_cast<void*>(&granularity)},
      {"cuMemMap", reinterpret_cast<void*>(&map_memory)},
      {"cuMemRelease", reinterpret_cast<void*>(&release)},
      {"cuMemSetAccess", reinterpret_cast<void*>(&set_access)},
      {"cuMemUnmap", reinterpret_cast<void*>(&unmap)},
  };
  const auto found = functions.find(name);
  return found == functions.end() ? nullptr : found->second;
}

}  // namespace flashpack::testing

extern "C" {

cudaError_t cudaMalloc(void** memory, std::size_t size_bytes) { return allocate("cudaMalloc", memory, size_bytes); }
cudaError_t cudaFree(void*) { return cudaSuccess; }

cudaError_t cudaMallocHost(void** memory, std::size_t size_bytes) {
  *memory = new std::byte[size_bytes];
  return cudaHostRegister(*memory, size_bytes, cudaHostRegisterDefault);
}
cudaError_t cudaFreeHost(void* memory) {
  const cudaError_t error = cudaHostUnregister(memory);
  delete[] static_cast<std::byte*>(memory);
  return error;
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t size_bytes, cudaStream_t handle) {
  Inside impl;
  if (const auto error = impl->enter("cudaMemsetAsync", Kind::kSafe)) return error;
  const auto set = [&impl = *impl, memory, value, size_bytes] {
    std::memset(impl.reachable(memory, size_bytes), value, size_bytes);
  };
  return impl->queue(*impl->stream_of(handle, impl->context()), {.kind = Work::Kind::kQuick, .act = set});
}

cudaError_t cudaMemset(void* memory, int value, std::size_t size_bytes) {
  if (const auto error = cudaMemsetAsync(memory, value, size_bytes, nullptr)) return error;
  return cudaStreamSynchronize(nullptr);
}

cudaError_t cudaMemcpy(void* target, const void* source, std::size_t size_bytes, cudaMemcpyKind kind) {
  if (const auto error = cudaMemcpyAsync(target, source, size_bytes, kind, nullptr)) return error;
  return cudaStreamSynchronize(nullptr);
}

cudaError_t cudaDeviceSynchronize() {
  if (const auto error = Inside()->enter("cudaDeviceSynchronize", Kind::kUnsafe)) return error;
  const auto idle = [] {
    Inside impl;
    impl->do_some();
    const auto all = impl->all_streams();
    return std::all_of(all.begin(), all.end(), [&](CUstream_st* stream) {
      return stream->context != &impl->context() || stream->queue.empty();
    });
  };
  while (!idle()) std::this_thread::yield();
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  Inside impl;
  if (const auto error = impl->enter("cudaLaunchHostFunc", Kind::kSafe)) return error;
  run_on_host(*impl, *impl->stream_of(handle, impl->context()), function, data);
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, std::size_t* count) {
  *count = graph->works.size();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new CUgraphExec_st{graph->works};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  Inside impl;
  if (const auto error = impl->enter("cudaGraphLaunch", Kind::kSafe)) return error;
  for (const Work& work : executable->works) impl->queue(*impl->stream_of(handle, impl->context()), work);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }

}  // extern "C"
