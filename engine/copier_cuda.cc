#include <algorithm>
#include <array>
#include <fstream>
#include <string>
#include <vector>

#include "engine/copier.h"
#include "engine/cuda_handles.h"
#include "engine/error.h"
#include "engine/workers.h"

namespace flashpack::engine {

namespace {

using cuda::check;
using cuda::code_of;
using cuda::DeviceGuard;

// One copy engine serves each direction; the second stream fills the pauses between copies of the first.
constexpr std::size_t kLanes = 2;

class CudaGate final : public Gate {
 public:
  CudaGate(int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    event_ = cuda::make_event();
    check(cudaEventRecord(event_.get(), stream ? stream : cudaStreamLegacy), "cudaEventRecord on the caller's stream");
  }

  bool open(std::error_code& error) noexcept override {
    const cudaError_t result = cudaEventQuery(event_.get());
    if (result == cudaErrorNotReady) {
      static_cast<void>(cudaGetLastError());
      return false;
    }
    if (result != cudaSuccess) error = code_of(result);
    return true;
  }

 private:
  cuda::Event event_;
};

class CudaCopier final : public Copier {
 public:
  CudaCopier(int device, std::span<const std::span<std::byte>> slots)
      : device_(current(device)),
        lock_(std::span(slots.front().data(), slots.back().data() + slots.back().size())),
        landed_(slots.size()) {
    for (cuda::Event& event : landed_) event = cuda::make_event();
    for (Lane& lane : lanes_) {
      lane.stream = cuda::make_stream();
      lane.copies.resize(slots.size());
    }
    completions_.reserve(slots.size());
    if (lock_.error() != cudaSuccess) {
      fallback_reason_ = "page-locked memory: cudaHostRegister: " + code_of(lock_.error()).message();
    }
  }

  void push(unsigned tag, const IoRequest& request) override {
    Lane& lane = lanes_[next_lane_++ % kLanes];
    const cudaEvent_t event = landed_[static_cast<std::size_t>(request.slot)].get();
    cudaError_t error = copy(request, lane.stream.get());
    if (error == cudaSuccess) error = cudaEventRecord(event, lane.stream.get());
    // Some pieces may be under way, and nothing will tell when they have landed.
    if (error != cudaSuccess) cudaStreamSynchronize(lane.stream.get());
    lane.copies[(lane.first + lane.count++) % lane.copies.size()] = {tag, event, error};
    ++under_way_;
  }

  // In each lane the oldest first: the others cannot have landed before it.
  std::span<const Completion> poll() override {
    completions_.clear();
    for (Lane& lane : lanes_) {
      while (lane.count > 0) {
        const Copy& copy = lane.copies[lane.first];
        const cudaError_t result = copy.error != cudaSuccess ? copy.error : cudaEventQuery(copy.event);
        if (result != cudaSuccess) static_cast<void>(cudaGetLastError());
        if (result == cudaErrorNotReady) break;
        completions_.push_back({copy.tag, result == cudaSuccess ? std::error_code() : code_of(result)});
        lane.first = (lane.first + 1) % lane.copies.size();
        --lane.count;
      }
    }
    under_way_ -= completions_.size();
    return completions_;
  }

  bool idle() const noexcept override { return under_way_ == 0; }

  std::unique_ptr<Gate> gate(CUstream_st* stream) override { return std::make_unique<CudaGate>(device_, stream); }

  bool owns(const void* memory) const override {
    cudaPointerAttributes attributes{};
    check(cudaPointerGetAttributes(&attributes, memory), "cudaPointerGetAttributes");
    if (attributes.type == cudaMemoryTypeDevice && attributes.device != device_) {
      throw Error(Errc::kInvalidArgument, "memory of CUDA device " + std::to_string(attributes.device) +
                                              " for an engine of device " + std::to_string(device_));
    }
    return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
  }

  const std::string& fallback_reason() const noexcept override { return fallback_reason_; }

 private:
  struct Copy {
    unsigned tag = 0;
    cudaEvent_t event = nullptr;
    cudaError_t error = cudaSuccess;  // Of starting it.
  };
  struct Lane {
    cuda::Stream stream;
    std::vector<Copy> copies;  // A circle.
    std::size_t first = 0;
    std::size_t count = 0;
  };

  static int current(int device) {
    check(cudaSetDevice(device), "cudaSetDevice");
    return device;
  }

  cudaError_t copy(const IoRequest& request, cudaStream_t stream) {
    sources_.clear();
    targets_.clear();
    sizes_.clear();
    const bool to_device = request.op == IoRequest::Op::kScatter;
    if (!to_device) clear_gaps(request);
    for (const Piece& piece : request.pieces) {
      std::byte* in_slot = request.memory.data() + (piece.offset_bytes - request.offset_bytes);
      sources_.push_back(to_device ? in_slot : piece.memory);
      targets_.push_back(to_device ? piece.memory : in_slot);
      sizes_.push_back(piece.size_bytes);
    }
    const bool batch = sizes_.size() > 1 && lock_.error() == cudaSuccess;  // Batches want locked memory.
    return batch ? copy_batch(stream, to_device) : copy_each(stream, to_device);
  }

  cudaError_t copy_each(cudaStream_t stream, bool to_device) {
    const cudaMemcpyKind kind = to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
    for (std::size_t i = 0; i < sizes_.size(); ++i) {
      const cudaError_t error = cudaMemcpyAsync(targets_[i], sources_[i], sizes_[i], kind, stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  // A call costs 5 us, as much as a copy of 256 KiB: many small pieces go in one.
  cudaError_t copy_batch(cudaStream_t stream, [[maybe_unused]] bool to_device) {
#if CUDART_VERSION >= 13000
    cudaMemcpyAttributes attributes{};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    std::size_t first = 0;
    return cudaMemcpyBatchAsync(targets_.data(), sources_.data(), sizes_.data(), sizes_.size(), &attributes, &first, 1,
                                stream);
#else
    return copy_each(stream, to_device);
#endif
  }

  const int device_;
  cuda::PageLock lock_;  // Goes after the streams, which may still copy.
  std::string fallback_reason_;
  std::vector<cuda::Event> landed_;  // By slot.
  std::array<Lane, kLanes> lanes_;
  std::size_t next_lane_ = 0;
  std::size_t under_way_ = 0;
  std::vector<Completion> completions_;
  std::vector<void*> targets_;  // Scratch of copy().
  std::vector<const void*> sources_;
  std::vector<std::size_t> sizes_;
};

class CudaCategory final : public std::error_category {
 public:
  const char* name() const noexcept override { return "cuda"; }
  std::string message(int value) const override {
    const auto error = static_cast<cudaError_t>(value);
    return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  }
};

}  // namespace

std::unique_ptr<Copier> make_cuda_copier(int device, std::span<const std::span<std::byte>> slots) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "CUDA: no usable device");
  return std::make_unique<CudaCopier>(device, slots);
}

int numa_node_of_cuda_device(int device) noexcept {
  std::array<char, 32> bus_id{};
  if (cudaDeviceGetPCIBusId(bus_id.data(), static_cast<int>(bus_id.size()), device) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return -1;
  }
  std::string name = bus_id.data();
  std::transform(name.begin(), name.end(), name.begin(),
                 [](char c) { return c >= 'A' && c <= 'F' ? char(c + 32) : c; });
  int node = -1;
  std::ifstream("/sys/bus/pci/devices/" + name + "/numa_node") >> node;
  return node;
}

}  // namespace flashpack::engine

const std::error_category& flashpack::cuda_category() noexcept { return engine::immortal<engine::CudaCategory>(); }
