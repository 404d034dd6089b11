#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <chrono>
#include <fstream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/copier.h"
#include "engine/cuda_handles.h"
#include "engine/gate_cuda.h"
#include "engine/ground/error.h"
#include "engine/ground/immortal.h"

namespace flashpack::internal {

namespace {

using cuda::check;
using cuda::code_of;
using cuda::Context;
using cuda::ContextGuard;
using cuda::taken;

// One copy engine serves each direction; the second stream fills the pauses between copies of the first. Other numbers
// were not measured.
constexpr std::size_t kStreams = 2;

// To start a copy takes the driver's time. More of them than this go to the pool, so that the driver stays free for the
// disk. A bound, and not tuned.
constexpr std::size_t kMostFragmentsForDriver = 16;

// A context that has failed answers every call with its error, also the question whether its copies have ended. The
// hardware stops the copies, but does not tell when. After this time they are taken for ended.
// A bound, and not tuned: a copy of a slot takes less than a millisecond.
constexpr std::chrono::seconds kSilence{1};

// Whether the context is gone. Its copies have ended then.
bool is_end_of_context(cudaError_t error) {
  return error == cudaErrorCudartUnloading || error == cudaErrorContextIsDestroyed ||
         error == cudaErrorDeviceUninitialized;
}

bool is_locked(const std::byte& byte) {
  cudaPointerAttributes attributes{};
  return taken(cudaPointerGetAttributes(&attributes, &byte)) == cudaSuccess && attributes.type == cudaMemoryTypeHost;
}

// Whether CUDA has page-locked the first and the last byte of each slot, by cudaHostAlloc or cudaHostRegister.
bool are_locked(std::span<const std::span<std::byte>> slots) {
  return std::all_of(slots.begin(), slots.end(),
                     [](const auto& slot) { return is_locked(slot.front()) && is_locked(slot.back()); });
}

// The copies of one device. The thread rules of each member are those of the Copier member of the same name.
class DeviceCopies {
 public:
  using EndedCopy = Copier::EndedCopy;

  /// `slots_lock` outlives it. Requires: the context is current.
  DeviceCopies(int device, const Context& context, std::size_t slots, const cuda::PageLock& slots_lock, Pool& pool)
      : device_(device), context_(context), pool_(pool), slots_lock_(slots_lock), copies_(slots) {
    for (Copy& copy : copies_) {
      copy.device = this;
      copy.ended = cuda::make_event();
      copy.reserve(kMostFragmentsForDriver);
    }
    for (CopyStream& copies : streams_) copies.stream = cuda::make_stream();
  }

  ~DeviceCopies() {
    const ContextGuard guard(context_);
    for (CopyStream& copies : streams_) give_back(copies.stream, guard);
    for (Copy& copy : copies_) give_back(copy.ended, guard);
  }
  DeviceCopies(const DeviceCopies&) = delete;
  DeviceCopies& operator=(const DeviceCopies&) = delete;

  void push(unsigned tag, unsigned slot, const ByteWork& work) {
    assert(slot < copies_.size() && (work.op == ByteWork::Op::kScatter || work.op == ByteWork::Op::kGather));
    CopyStream& copies = streams_[next_stream_++ % kStreams];
    Copy& copy = copies_[slot];
    copy.tag = tag;
    copy.work = work;
    copy.stream = copies.stream.get();
    copy.next = nullptr;
    copy.started = false;
    *std::exchange(copies.last, &copy.next) = &copy;
    ++under_way_;
    // A copy to or from memory that is not locked blocks until it has ended.
    const bool may_take_long = !locked() || work.fragments.size() > kMostFragmentsForDriver;
    may_take_long ? pool_.post(copy) : copy.run();
  }

  /// Adds the copies that have ended to `ended`. Looks at the oldest copy of each stream first, because later ones
  /// hardly end before it.
  void poll(std::vector<EndedCopy>& ended) {
    if (idle()) return;
    const ContextGuard guard(context_);
    for (CopyStream& copies : streams_) {
      while (copies.first && look_for_end(*copies.first, guard)) {
        const Copy& copy = *copies.first;
        ended.push_back({copy.tag, copy.error == cudaSuccess ? std::error_code() : code_of(copy.error)});
        --under_way_;
        copies.first = copy.next;
        if (!copies.first) copies.last = &copies.first;
      }
    }
  }

  bool idle() const noexcept { return under_way_ == 0; }
  std::unique_ptr<Gate> gate(CUstream_st* stream) const {
    return cuda::make_gate(context_, stream ? stream : cudaStreamLegacy);
  }

  /// Any thread: number of the device, as for cudaSetDevice.
  int device() const noexcept { return device_; }
  /// Any thread: why copies in batches are refused; cudaSuccess as long as they are not.
  cudaError_t batches_refused() const noexcept { return batches_refused_; }
  /// Any thread: asks about any memory, also of other devices.
  cudaError_t find_attributes(const void* memory, cudaPointerAttributes& attributes) const {
    const ContextGuard guard(context_);
    if (guard.error() != cudaSuccess) return guard.error();
    return taken(cudaPointerGetAttributes(&attributes, memory));
  }

 private:
  // A copy from or to one slot.
  struct Copy final : Pool::Task {
    void reserve(std::size_t fragments);
    void list_fragments();
    void run() noexcept override {
      error = device->start(*this);
      started = true;
    }

    DeviceCopies* device = nullptr;
    cuda::Event ended;  // Recorded behind the copy.
    unsigned tag = 0;
    ByteWork work{};
    cudaStream_t stream = nullptr;
    Copy* next = nullptr;                 // The next copy in its stream.
    cudaError_t error = cudaSuccess;      // First error of the copy or of its event.
    std::atomic<bool> started = false;    // Only the driver uses the copy from then on.
    std::vector<void*> targets, sources;  // One for every fragment.
    std::vector<std::size_t> sizes;
  };
  struct CopyStream {
    cuda::Stream stream;
    Copy* first = nullptr;
    Copy** last = &first;
  };

  cudaError_t start(Copy& copy) {
    const ContextGuard guard(context_);
    if (guard.error() != cudaSuccess) return guard.error();
    if (copy.work.op == ByteWork::Op::kGather) clear_gaps(copy.work.view, copy.work.fragments);
    copy.list_fragments();
    const cudaError_t error = copy_fragments(copy);
    return error == cudaSuccess ? taken(cudaEventRecord(copy.ended.get(), copy.stream)) : error;
  }

  // Copies many small fragments in one call, if memory is locked, and driver and runtime have CUDA 12.8.
  cudaError_t copy_fragments(const Copy& copy) {
    const bool try_batch = copy.sizes.size() > 1 && locked() && batches_refused_ == cudaSuccess;
    const cudaError_t refused = try_batch ? taken(copy_batch(copy)) : cudaSuccess;
    if (try_batch && refused == cudaSuccess) return cudaSuccess;
    const cudaError_t error = copy_each(copy);
    if (error == cudaSuccess && refused != cudaSuccess) batches_refused_ = refused;
    return error;
  }

  static cudaError_t copy_batch(const Copy& copy);

  static cudaError_t copy_each(const Copy& copy) {
    const bool load = copy.work.op == ByteWork::Op::kScatter;
    const cudaMemcpyKind kind = load ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
    for (std::size_t i = 0; i < copy.sizes.size(); ++i) {
      const cudaError_t error =
          taken(cudaMemcpyAsync(copy.targets[i], copy.sources[i], copy.sizes[i], kind, copy.stream));
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  // Asks once whether the copy has ended, well or not: the device does not touch slot and fragments any more. Notes the
  // copy's error. After an error the event may not have been recorded, and an error as answer does not say that the
  // copy has ended. In both cases only an empty stream tells that it has.
  bool look_for_end(Copy& copy, const ContextGuard& guard) {
    if (!copy.started) return false;
    const cudaError_t answer = guard.error() != cudaSuccess ? guard.error()
                               : copy.error == cudaSuccess  ? taken(cudaEventQuery(copy.ended.get()))
                                                            : taken(cudaStreamQuery(copy.stream));
    if (answer == cudaSuccess || answer == cudaErrorNotReady) {
      silent_since_.reset();
      return answer == cudaSuccess;
    }
    if (copy.error == cudaSuccess) copy.error = answer;
    const auto now = std::chrono::steady_clock::now();
    if (!silent_since_) silent_since_ = now;
    return is_end_of_context(answer) || now - *silent_since_ >= kSilence;
  }

  bool locked() const noexcept { return slots_lock_.error() == cudaSuccess; }

  const int device_;
  const Context context_;
  Pool& pool_;
  const cuda::PageLock& slots_lock_;
  std::vector<Copy> copies_;  // One for each slot.
  std::array<CopyStream, kStreams> streams_;
  std::size_t next_stream_ = 0;
  std::size_t under_way_ = 0;
  std::optional<std::chrono::steady_clock::time_point> silent_since_;
  std::atomic<cudaError_t> batches_refused_ = cudaSuccess;
};

void DeviceCopies::Copy::reserve(std::size_t fragments) {
  targets.reserve(fragments);
  sources.reserve(fragments);
  sizes.reserve(fragments);
}

void DeviceCopies::Copy::list_fragments() {
  targets.clear();
  sources.clear();
  sizes.clear();
  const bool load = work.op == ByteWork::Op::kScatter;
  for (const Fragment& fragment : work.fragments) {
    std::byte* const in_slot = work.view.of(fragment);
    sources.push_back(load ? in_slot : fragment.memory);
    targets.push_back(load ? fragment.memory : in_slot);
    sizes.push_back(fragment.size_bytes);
  }
}

cudaError_t DeviceCopies::copy_batch([[maybe_unused]] const Copy& copy) {
#if CUDART_VERSION >= 12080
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  std::size_t first = 0;
#if CUDART_VERSION >= 13000
  return cudaMemcpyBatchAsync(copy.targets.data(), copy.sources.data(), copy.sizes.data(), copy.sizes.size(),
                              &attributes, &first, 1, copy.stream);
#else
  Copy& lists = const_cast<Copy&>(copy);  // CUDA only reads the lists.
  std::size_t failed = 0;
  return cudaMemcpyBatchAsync(lists.targets.data(), lists.sources.data(), lists.sizes.data(), lists.sizes.size(),
                              &attributes, &first, 1, &failed, copy.stream);
#endif
#else
  return cudaErrorNotSupported;
#endif
}

// The devices' numbers, for messages.
std::string text_of(const std::vector<std::unique_ptr<DeviceCopies>>& devices) {
  std::string text = devices.size() == 1 ? "device " : "devices ";
  for (const auto& device : devices) text += (device == devices.front() ? "" : ", ") + std::to_string(device->device());
  return text;
}

class CudaCopier final : public Copier {
 public:
  /// Requires: the first context is current.
  CudaCopier(std::span<const int> devices, std::span<const Context> contexts,
             std::span<const std::span<std::byte>> slots, Pool& pool, bool callers_memory)
      : lock_(contexts.front(), std::span(slots.front().data(), slots.back().data() + slots.back().size()),
              callers_memory && are_locked(slots)) {
    for (std::size_t i = 0; i < devices.size(); ++i) {
      const ContextGuard guard(contexts[i]);
      check(guard.error(), "the device's context");
      devices_.push_back(std::make_unique<DeviceCopies>(devices[i], contexts[i], slots.size(), lock_, pool));
    }
    ended_.reserve(slots.size());
  }

  void push(unsigned tag, unsigned slot, const ByteWork& work) override {
    of(work.fragments.front().device).push(tag, slot, work);
  }

  std::span<const EndedCopy> poll() override {
    ended_.clear();
    for (const auto& device : devices_) device->poll(ended_);
    return ended_;
  }

  bool idle() const noexcept override {
    return std::ranges::all_of(devices_, [](const auto& device) { return device->idle(); });
  }

  std::unique_ptr<Gate> gate(DeviceNumber device, CUstream_st* stream) override { return of(device).gate(stream); }

  DeviceNumber device_of(const void* memory) const override {
    const cudaPointerAttributes attributes = attributes_of(memory);
    const bool managed = attributes.type == cudaMemoryTypeManaged;
    if (attributes.type != cudaMemoryTypeDevice && !managed) return kHost;
    const auto is_there = [&](const auto& device) { return device->device() == attributes.device; };
    const auto found = std::ranges::find_if(devices_, is_there);
    if (found != devices_.end()) return static_cast<DeviceNumber>(found - devices_.begin() + 1);
    if (managed) return 1;  // A copy on any device moves it.
    throw Error(Errc::kInvalidArgument, "memory of CUDA device " + std::to_string(attributes.device) +
                                            " for an engine of " + text_of(devices_));
  }

  DeviceNumber devices() const noexcept override { return static_cast<DeviceNumber>(devices_.size()); }
  bool locked() const noexcept override { return lock_.error() == cudaSuccess; }

  std::string fallback_reason() const override {
    if (!locked()) return "page-locked memory: cudaHostRegister: " + code_of(lock_.error()).message();
    for (const auto& device : devices_) {
      const cudaError_t refused = device->batches_refused();
      if (refused != cudaSuccess) return "copies in batches: cudaMemcpyBatchAsync: " + code_of(refused).message();
    }
    return "";
  }

 private:
  DeviceCopies& of(DeviceNumber device) const { return *devices_[device - 1u]; }

  // Any device knows the memory of all, but one that has failed gives no answer.
  cudaPointerAttributes attributes_of(const void* memory) const {
    cudaPointerAttributes attributes{};
    cudaError_t error = cudaSuccess;
    for (const auto& device : devices_) {
      error = device->find_attributes(memory, attributes);
      if (error == cudaSuccess) break;
    }
    check(error, "cudaPointerGetAttributes");
    return attributes;
  }

  const cuda::PageLock lock_;                           // Unlocks after the streams, which may still copy, have gone.
  std::vector<std::unique_ptr<DeviceCopies>> devices_;  // In the order of their DeviceNumbers.
  std::vector<EndedCopy> ended_;
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

std::unique_ptr<Copier> make_cuda_copier(std::span<const int> devices, std::span<const std::span<std::byte>> slots,
                                         Pool& pool, bool callers_memory) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "CUDA: no usable device");
  std::vector<Context> contexts(devices.rbegin(), devices.rend());  // Backwards: the one made last is current here.
  std::ranges::reverse(contexts);
  const ContextGuard guard(contexts.front());
  check(guard.error(), "the device's context");
  return std::make_unique<CudaCopier>(devices, contexts, slots, pool, callers_memory);
}

int numa_node_of_cuda_device(int device) noexcept {
  std::array<char, 32> bus_id{};
  if (taken(cudaDeviceGetPCIBusId(bus_id.data(), static_cast<int>(bus_id.size()), device)) != cudaSuccess) return -1;
  std::string name = bus_id.data();
  std::transform(name.begin(), name.end(), name.begin(),
                 [](char c) { return c >= 'A' && c <= 'F' ? char(c + 32) : c; });
  int node = -1;
  std::ifstream("/sys/bus/pci/devices/" + name + "/numa_node") >> node;
  return node;
}

}  // namespace flashpack::internal

const std::error_category& flashpack::cuda_category() noexcept { return internal::immortal<internal::CudaCategory>(); }

namespace {
[[maybe_unused]] const std::error_category& cuda_category_made_at_once = flashpack::cuda_category();  // As in error.cc.
}  // namespace
