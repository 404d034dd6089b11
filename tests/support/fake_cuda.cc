#include "tests/support/fake_cuda.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "tests/support/bulk.h"
#include "tests/support/fake_cuda_impl.h"

namespace flashpack::testing {

void misuse(const char* what) {
  std::fprintf(stderr, "misuse of CUDA: %s\n", what);
  std::abort();
}

namespace {

FakeCuda::Impl* the_impl = nullptr;

// The fake's mutex protects the shadow of device memory, so that there are no races for a sanitizer to see.
void poison_shadow(void* shadow, std::size_t size_bytes) {
  const Unseen unseen;
  fill_bytes(shadow, FakeCuda::kPoison, size_bytes);
}

std::string name_of_this_thread() {
  std::array<char, 16> name{};
  ::pthread_getname_np(::pthread_self(), name.data(), name.size());
  return name.data();
}

}  // namespace

Inside::Inside() : impl_((FakeCuda::get(), the_impl)), lock_(impl_->mutex) {}

FakeCuda::Impl::Impl() : owner(::getpid()) {
  for (int device = 0; device < kMostDevices; ++device) {
    CUctx_st& context = contexts[static_cast<std::size_t>(device)];
    context.device = device;
    context.legacy.context = &context;
  }
}

FakeCuda::Impl::Thread& FakeCuda::Impl::thread() {
  thread_local Thread thread;
  if (thread.epoch != epoch) thread = {.epoch = epoch};
  return thread;
}

cudaError_t FakeCuda::Impl::enter(const char* function, Kind kind) {
  ++calls[function];
  ++all_calls;
  callers.emplace(function, name_of_this_thread());
  if (unloading) return note(cudaErrorCudartUnloading);
  if (::getpid() != owner) return note(cudaErrorInitializationError);
  if (kind != Kind::kNoContext) {
    auto& stack = thread().contexts;
    if (stack.empty()) stack.push_back(&primary(thread().device));
    if (!stack.back()->alive) return note(cudaErrorContextIsDestroyed);
    if (stack.back()->sticky != cudaSuccess) return note(stack.back()->sticky);
  }
  const auto found = failures.find(function);
  if (found != failures.end() && --found->second.countdown <= 0) {
    const Failure failure = found->second;
    if (--found->second.times == 0) failures.erase(found);
    if (failure.sticky && kind != Kind::kNoContext) context().sticky = failure.error;
    return note(failure.error);
  }
  return kind == Kind::kUnsafe && breaks_captures() ? note(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t FakeCuda::Impl::note(cudaError_t error) {
  if (error != cudaSuccess) thread().last_error = error;
  return error;
}

// By a call that may wait for the device: captures that forbid it to this thread.
bool FakeCuda::Impl::breaks_captures() {
  const cudaStreamCaptureMode mode = thread().mode;
  bool broken = false;
  for (CUstream_st* stream : all_streams()) {
    auto& capture = stream->capture;
    if (!capture || capture->mode == cudaStreamCaptureModeRelaxed || mode == cudaStreamCaptureModeRelaxed) continue;
    const bool everywhere = capture->mode == cudaStreamCaptureModeGlobal && mode == cudaStreamCaptureModeGlobal;
    if (!everywhere && capture->thread != std::this_thread::get_id()) continue;
    broken = capture->broken = true;
  }
  return broken;
}

CUctx_st& FakeCuda::Impl::primary(int device) {
  CUctx_st& context = contexts[static_cast<std::size_t>(device)];
  context.alive = true;
  context.was_reset = false;
  return context;
}

// With all that is in it, after its work has come to an end.
void FakeCuda::Impl::destroy(CUctx_st& context) {
  held = false;
  for (CUstream_st* stream : all_streams()) {
    if (stream->context != &context) continue;
    finish(*stream);
    require(stream->queue.empty(), "a reset with kernels under way");
    if (streams.erase(stream) == 1) delete stream;
  }
  std::erase_if(events, [&](CUevent_st* event) {
    const bool lost = event->context == &context;
    if (lost) delete event;
    return lost;
  });
  std::erase_if(registrations, [&](const auto& entry) { return entry.second.context == &context; });
  context.alive = false;
  context.sticky = cudaSuccess;
}

CUstream_st* FakeCuda::Impl::stream_of(cudaStream_t stream, CUctx_st& context) {
  if (stream == nullptr || stream == cudaStreamLegacy) return &context.legacy;
  if (stream == cudaStreamPerThread) {
    CUstream_st& own = per_thread[{&context, std::this_thread::get_id()}];
    own.context = &context;
    own.blocking = true;
    return &own;
  }
  require(streams.contains(stream), "a stream that is none, or not any more");
  return stream;
}

std::vector<CUstream_st*> FakeCuda::Impl::all_streams() {
  std::vector<CUstream_st*> all(streams.begin(), streams.end());
  for (CUctx_st& context : contexts) all.push_back(&context.legacy);
  for (auto& [key, stream] : per_thread) all.push_back(&stream);
  return all;
}

cudaError_t FakeCuda::Impl::queue(CUstream_st& stream, Work work) {
  bool broken = false;
  for (CUstream_st* other : all_streams()) {
    if (&stream != &stream.context->legacy || other->context != stream.context) continue;
    if (other->blocking && other->capture) broken = other->capture->broken = true;
  }
  if (broken) return note(cudaErrorStreamCaptureImplicit);
  ++stream.touches;
  work.number = ++works;
  stream.capture ? stream.capture->graph.push_back(std::move(work)) : stream.queue.push_back(std::move(work));
  return cudaSuccess;
}

std::byte* FakeCuda::Impl::map(std::size_t size_bytes, int device, bool managed, std::byte* at, std::byte* shadow_at) {
  size_bytes = (size_bytes + 4095) / 4096 * 4096;
  const int fd = ::memfd_create("device", 0);
  require(fd >= 0 && ::ftruncate(fd, static_cast<off_t>(size_bytes)) == 0, "out of device memory");
  const int access = managed ? PROT_READ | PROT_WRITE : PROT_NONE;
  void* address = ::mmap(at, size_bytes, access, MAP_SHARED | (at ? MAP_FIXED : 0), fd, 0);
  void* shadow = ::mmap(shadow_at, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | (at ? MAP_FIXED : 0), fd, 0);
  ::close(fd);
  require(address != MAP_FAILED && shadow != MAP_FAILED, "out of address space");
  poison_shadow(shadow, size_bytes);
  regions.push_back({static_cast<std::byte*>(address), static_cast<std::byte*>(shadow), size_bytes, device, managed});
  return static_cast<std::byte*>(address);
}

FakeCuda::Impl::Region* FakeCuda::Impl::region_of(const void* memory) {
  const auto* at = static_cast<const std::byte*>(memory);
  for (Region& region : regions) {
    if (at >= region.address && at < region.address + region.size_bytes) return &region;
  }
  return nullptr;
}

// Also where several allocations follow on each other, in both mappings.
std::byte* FakeCuda::Impl::shadow_of(const void* memory, std::size_t size_bytes) {
  const auto* at = static_cast<const std::byte*>(memory);
  std::byte* first = nullptr;
  for (std::size_t done = 0; done < size_bytes;) {
    const Region* region = region_of(at + done);
    require(region != nullptr, first ? "past the end of device memory" : "device memory that is none");
    require(region->there, "memory to which its stream has not come");
    const auto offset = static_cast<std::size_t>(at + done - region->address);
    if (!first) first = region->shadow + offset;
    done += region->size_bytes - offset;
  }
  return first;
}

std::byte* FakeCuda::Impl::reachable(const void* memory, std::size_t size_bytes) {
  if (region_of(memory)) return shadow_of(memory, size_bytes);
  return static_cast<std::byte*>(const_cast<void*>(memory));
}

bool FakeCuda::Impl::registered(const void* memory, std::size_t size_bytes, const CUctx_st& context) const {
  const auto* at = static_cast<const std::byte*>(memory);
  return std::any_of(registrations.begin(), registrations.end(), [&](const auto& registration) {
    return (registration.second.portable || registration.second.context == &context) && at >= registration.first &&
           at + size_bytes <= registration.first + registration.second.size_bytes;
  });
}

// Any that has a byte of it.
const FakeCuda::Impl::Registration* FakeCuda::Impl::registration_near(const void* memory,
                                                                      std::size_t size_bytes) const {
  const auto* at = static_cast<const std::byte*>(memory);
  for (const auto& [begin, registration] : registrations) {
    if (at < begin + registration.size_bytes && begin < at + size_bytes) return &registration;
  }
  return nullptr;
}

bool FakeCuda::Impl::is_being_copied(std::span<const std::byte> memory) {
  const auto touches_it = [&](const Work& work) {
    return work.locked_memory.data() < memory.data() + memory.size() &&
           memory.data() < work.locked_memory.data() + work.locked_memory.size();
  };
  const auto all = all_streams();
  return std::any_of(all.begin(), all.end(), [&](const CUstream_st* stream) {
    return std::any_of(stream->queue.begin(), stream->queue.end(), touches_it);
  });
}

cudaError_t FakeCuda::Impl::copy(CUstream_st& stream, void* target, const void* source, std::size_t size_bytes) {
  const bool to_device = region_of(target) != nullptr;
  const void* device_end = to_device ? target : source;
  const void* host_end = to_device ? source : target;
  require(region_of(device_end) != nullptr && region_of(host_end) == nullptr, "a copy from host to host");
  const Region& region = *region_of(device_end);
  require(region.managed || region.device == stream.context->device, "a copy on a stream of another device");
  const bool locked = registered(host_end, size_bytes, *stream.context);
  // The runtime takes the bytes of other memory with it.
  const auto* bytes = static_cast<const std::byte*>(source);
  const auto taken = std::make_shared<std::vector<std::byte>>();
  if (to_device && !locked) {
    show_reads(bytes, size_bytes);
    const Unseen unseen;
    taken->assign(bytes, bytes + size_bytes);
  }
  const auto land = [this, target, source, size_bytes, taken, to_device] {
    if (to_device && taken->empty()) show_reads(source, size_bytes);
    if (!to_device) show_writes(target, size_bytes);
    const Unseen unseen;
    copy_bytes(reachable(target, size_bytes), taken->empty() ? reachable(source, size_bytes) : taken->data(),
               size_bytes);
    --copies_under_way;
  };
  Work work{.kind = Work::Kind::kCopy, .act = land};
  if (locked) work.locked_memory = {static_cast<const std::byte*>(host_end), size_bytes};
  if (const auto error = queue(stream, std::move(work))) return error;
  pageable_copies += !locked;
  if (to_device && region_of(target)->there) poison_shadow(shadow_of(target, size_bytes), size_bytes);
  most_copies_under_way = std::max(most_copies_under_way, ++copies_under_way);
  return cudaSuccess;
}

// The legacy default stream waits for what was queued before on streams that block, and they for it.
bool FakeCuda::Impl::may_begin(const CUstream_st& stream) const {
  const Work& work = stream.queue.front();
  if (work.kind == Work::Kind::kKernel || (held && work.kind == Work::Kind::kCopy)) return false;
  const CUstream_st& legacy = stream.context->legacy;
  const auto before = [&](const CUstream_st& other) {
    return other.context == stream.context && !other.queue.empty() && other.queue.front().number < work.number;
  };
  if (&stream != &legacy) return !(stream.blocking && before(legacy));
  return std::none_of(streams.begin(), streams.end(), [&](CUstream_st* s) { return s->blocking && before(*s); }) &&
         std::none_of(per_thread.begin(), per_thread.end(), [&](const auto& own) { return before(own.second); });
}

// The first of a stream's work, if it can be done.
bool FakeCuda::Impl::do_one(CUstream_st& stream) {
  if (stream.queue.empty() || !may_begin(stream)) return false;
  const Work work = std::move(stream.queue.front());
  stream.queue.pop_front();
  work.act();
  return true;
}

void FakeCuda::Impl::do_some() {
  std::vector<CUstream_st*> all = all_streams();
  std::shuffle(all.begin(), all.end(), random);
  for (CUstream_st* stream : all) {
    for (auto n = random() % 4; n > 0 && do_one(*stream); --n) {
    }
  }
}

void FakeCuda::Impl::finish(CUstream_st& stream) {
  while (do_one(stream)) {
  }
}

FakeCuda& FakeCuda::get() {
  static FakeCuda& fake = *new FakeCuda;  // Threads use it until the end of the process.
  return fake;
}

FakeCuda::FakeCuda() : impl_(std::make_unique<Impl>()) { the_impl = impl_.get(); }
FakeCuda::~FakeCuda() = default;

void FakeCuda::reset(unsigned seed) {
  Inside impl;
  require(impl->streams.empty() && impl->events.empty() && impl->registrations.empty(), "handles left behind");
  for (const Impl::Region& region : impl->regions) {
    ::munmap(region.address, region.size_bytes);
    ::munmap(region.shadow, region.size_bytes);
  }
  impl->regions.clear();
  impl->graphs.clear();
  impl->per_thread.clear();
  for (CUctx_st& context : impl->contexts) {
    context = {.device = context.device};
    context.legacy.context = &context;
  }
  ++impl->epoch;
  impl->unloading = false;
  impl->devices = Impl::kDevices;
  impl->failures.clear();
  impl->calls.clear();
  impl->callers.clear();
  impl->all_calls = impl->pageable_copies = impl->copies_under_way = impl->most_copies_under_way = 0;
  impl->held = false;
  impl->random.seed(seed);
}

std::byte* FakeCuda::allocate(std::size_t size_bytes, int device) { return Inside()->map(size_bytes, device, false); }

std::byte* FakeCuda::allocate_mapped(std::initializer_list<std::size_t> sizes_bytes, int device) {
  Inside impl;
  std::size_t total = 0;
  for (const std::size_t size : sizes_bytes) total += size;
  const auto reserve = [&] {
    return static_cast<std::byte*>(::mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  };
  std::byte* const address = reserve();
  std::byte* const shadow = reserve();
  std::size_t at = 0;
  for (const std::size_t size : sizes_bytes) {
    impl->map(size, device, false, address + at, shadow + at);
    at += size;
  }
  return address;
}

std::vector<std::byte> FakeCuda::read(const std::byte* device_memory, std::size_t size_bytes) {
  Inside impl;
  const std::byte* shadow = impl->shadow_of(device_memory, size_bytes);
  return {shadow, shadow + size_bytes};
}

bool FakeCuda::holds(const std::byte* device_memory, std::span<const std::byte> bytes) {
  Inside impl;
  return same_bytes(impl->shadow_of(device_memory, bytes.size()), bytes.data(), bytes.size());
}

bool FakeCuda::is_poison(const std::byte* device_memory, std::size_t size_bytes) {
  Inside impl;
  return all_bytes_are(kPoison, impl->shadow_of(device_memory, size_bytes), size_bytes);
}

void FakeCuda::poison(std::byte* device_memory, std::size_t size_bytes) {
  Inside impl;
  poison_shadow(impl->shadow_of(device_memory, size_bytes), size_bytes);
}

void FakeCuda::write(std::byte* device_memory, std::span<const std::byte> bytes) {
  Inside impl;
  copy_bytes(impl->shadow_of(device_memory, bytes.size()), bytes.data(), bytes.size());
}

void FakeCuda::hold(bool held) { Inside()->held = held; }

void FakeCuda::finish_all() {
  Inside impl;
  bool some = true;
  while (std::exchange(some, false)) {
    for (CUstream_st* stream : impl->all_streams()) {
      while (impl->do_one(*stream)) some = true;
    }
  }
}

void FakeCuda::start_kernel(cudaStream_t stream, int device) {
  Inside impl;
  impl->queue(*impl->stream_of(stream, impl->contexts[static_cast<std::size_t>(device)]),
              {.kind = Work::Kind::kKernel});
}

void FakeCuda::end_kernel(cudaStream_t stream, int device) {
  Inside impl;
  auto& queue = impl->stream_of(stream, impl->contexts[static_cast<std::size_t>(device)])->queue;
  const auto at = std::find_if(queue.begin(), queue.end(), [](const Work& w) { return w.kind == Work::Kind::kKernel; });
  require(at != queue.end(), "no kernel to end");
  queue.erase(at);
}

int FakeCuda::touches(cudaStream_t stream) {
  Inside impl;
  return impl->stream_of(stream, impl->contexts[1])->touches;
}

int FakeCuda::captured(cudaStream_t stream) {
  Inside impl;
  const auto& capture = impl->stream_of(stream, impl->contexts[1])->capture;
  return capture ? static_cast<int>(capture->graph.size()) : 0;
}

void FakeCuda::fail(const std::string& function, int nth, cudaError_t error, bool sticky, int times) {
  Inside impl;
  impl->failures.erase(function);
  if (error != cudaSuccess) impl->failures[function] = {nth, error, sticky, times};
}
void FakeCuda::unload() {
  Inside impl;
  for (CUstream_st* stream : std::exchange(impl->streams, {})) delete stream;
  for (CUevent_st* event : std::exchange(impl->events, {})) delete event;
  impl->registrations.clear();
  impl->copies_under_way = 0;
  impl->unloading = true;
}
void FakeCuda::fail_context(int device, cudaError_t error) {
  Inside impl;
  CUctx_st& context = impl->contexts[static_cast<std::size_t>(device)];
  context.sticky = error;
  const auto is_copy = [](const Work& work) { return work.kind == Work::Kind::kCopy; };
  for (CUstream_st* stream : impl->all_streams()) {
    if (stream->context == &context) impl->copies_under_way -= static_cast<int>(std::erase_if(stream->queue, is_copy));
  }
}
void FakeCuda::lose_context(int device) {
  Inside impl;
  impl->destroy(impl->contexts[static_cast<std::size_t>(device)]);
}
void FakeCuda::show_devices(int count) {
  require(count <= Impl::kMostDevices, "more devices than the fake has");
  Inside()->devices = count;
}
bool FakeCuda::failure_pending() { return !Inside()->failures.empty(); }
int FakeCuda::calls(const std::string& function) { return Inside()->calls[function]; }
int FakeCuda::all_calls() { return Inside()->all_calls; }
bool FakeCuda::called_by(const std::string& function, const std::string& thread) {
  return Inside()->callers.contains({function, thread});
}
bool FakeCuda::has_context(int device) { return Inside()->contexts[static_cast<std::size_t>(device)].alive; }
int FakeCuda::live_streams() { return static_cast<int>(Inside()->streams.size()); }
int FakeCuda::live_events() { return static_cast<int>(Inside()->events.size()); }
int FakeCuda::registrations() { return static_cast<int>(Inside()->registrations.size()); }
int FakeCuda::pageable_copies() { return Inside()->pageable_copies; }
int FakeCuda::most_copies_under_way() { return Inside()->most_copies_under_way; }
int FakeCuda::copies_under_way(int device) {
  Inside impl;
  std::ptrdiff_t count = 0;
  for (const CUstream_st* stream : impl->all_streams()) {
    if (stream->context->device != device) continue;
    count += std::count_if(stream->queue.begin(), stream->queue.end(),
                           [](const Work& work) { return work.kind == Work::Kind::kCopy; });
  }
  return static_cast<int>(count);
}

}  // namespace flashpack::testing
