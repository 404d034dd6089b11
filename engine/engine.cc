#include "flashpack/engine.h"

#include <sched.h>
#include <sys/random.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <future>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "engine/engine_impl.h"
#include "engine/ground/error.h"
#include "engine/ground/option_limits.h"
#include "engine/ground/pages.h"
#include "engine/ground/reasons.h"
#include "engine/ground/target_pages.h"
#include "engine/ring.h"
#include "engine/staging.h"
#include "engine/thread.h"
#include "engine/workers.h"

namespace flashpack {

namespace {

using internal::argument_error;

// To read this much from the page cache takes 50 us. To wake another thread for it and to be woken takes 91 us where
// cores sleep in between (engine_bench, cost/wake).
constexpr std::uint32_t kAtOnceBytes = 256 << 10;

// The number of the next engine of this process.
std::atomic<std::uint32_t> next_engine = 1;

// The number of slots in the staging memory.
std::uint64_t slots_in(const EngineOptions& options) {
  const std::uint64_t bytes = options.staging.empty() ? options.staging_bytes : options.staging.size();
  return bytes / options.chunk_bytes;
}

void check_staging_of_caller(const EngineOptions& options) {
  if (options.staging.empty()) return;
  if (reinterpret_cast<std::uintptr_t>(options.staging.data()) % internal::system_page_bytes() != 0)
    throw argument_error("engine options: staging must begin at a page");
  if (options.staging_bytes != 0) throw argument_error("engine options: staging and staging_bytes exclude each other");
  if (options.numa_node) throw argument_error("engine options: staging and numa_node exclude each other");
  if (!internal::is_number_of_slots(slots_in(options)))
    throw argument_error("engine options: staging must have from 2 to 16384 chunks");
  // The workers write to slots, where memory that cannot be written would end the process; the kernel only says so.
  for (std::size_t at = 0; at + options.chunk_bytes <= options.staging.size(); at += options.chunk_bytes) {
    if (::getrandom(options.staging.data() + at, 1, GRND_NONBLOCK) < 0 && errno == EFAULT)
      throw Error(internal::errno_code(EFAULT), "engine options: staging cannot be written");
  }
}

void check_devices(const EngineOptions& options) {
  if (options.more_devices.empty()) return;
  if (!internal::is_number_of_more_devices(options.more_devices.size()))
    throw argument_error("engine options: more_devices must be at most 63");
  std::set<int> seen{options.device.index};
  for (const Device& device : options.more_devices) {
    if (options.device.kind != Device::Kind::kCuda || device.kind != Device::Kind::kCuda)
      throw argument_error("engine options: more_devices is for CUDA devices alone");
    if (!seen.insert(device.index).second)
      throw argument_error("engine options: CUDA device " + std::to_string(device.index) + " twice");
  }
}

// The numbers of the CUDA devices, in the order of their DeviceNumbers.
std::vector<int> cuda_devices(const EngineOptions& options) {
  std::vector<int> devices{options.device.index};
  for (const Device& device : options.more_devices) devices.push_back(device.index);
  return devices;
}

EngineOptions checked(EngineOptions options) {
  check_devices(options);
  if (!internal::is_chunk_size(options.chunk_bytes))
    throw argument_error("engine options: chunk_bytes must be a power of two from 1 MiB to 1 GiB");
  if (!internal::is_queue_depth(options.queue_depth))
    throw argument_error("engine options: queue_depth must be from 1 to 1024");
  check_staging_of_caller(options);
  if (options.staging.empty()) {
    if (options.staging_bytes == 0) options.staging_bytes = internal::usual_staging_bytes(options.device.kind);
    if (!internal::is_number_of_slots(slots_in(options)))
      throw argument_error("engine options: staging_bytes must be from 2 to 16384 chunks");
  }
  if (!internal::is_number_of_workers(options.workers))
    throw argument_error("engine options: workers must be at most 64");
  if (options.numa_node && *options.numa_node < 0)
    throw argument_error("engine options: numa_node must not be negative");
  const bool cuda = options.device.kind == Device::Kind::kCuda;
  // For a GPU, 12 are as fast as 14 and faster than 8, 10 and 16 (bench/README.md, "To a GPU"). For the host, 8 is a
  // bound and not tuned: two cores copy 16 GB/s from the page cache, so that 8 can use all that most memory gives.
  if (options.workers == 0) options.workers = std::clamp(std::thread::hardware_concurrency(), 2u, cuda ? 12u : 8u);
  return options;
}

void bind_this_thread(const std::vector<int>& cpus) {
  if (cpus.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) {
    if (cpu < 0 || cpu >= CPU_SETSIZE)
      throw argument_error("engine options: cpu_affinity: no CPU " + std::to_string(cpu));
    CPU_SET(static_cast<unsigned>(cpu), &set);
  }
  if (::sched_setaffinity(0, sizeof set, &set) != 0) {
    throw Error(internal::errno_code(errno), "engine options: cpu_affinity");
  }
}

// Null if the workers are asked for.
std::unique_ptr<internal::Ring> make_ring(Backend backend, unsigned tags,
                                          const std::vector<std::span<std::byte>>& slots) {
  using internal::Ring;
  if (backend == Backend::kWorkers) return nullptr;
  if (backend != Backend::kPlainIoUring) return std::make_unique<Ring>(tags, slots);
  return std::make_unique<Ring>(tags, std::vector<std::span<std::byte>>{}, Ring::Rung::kBare);
}

}  // namespace

// The objects that the driver thread works with. The pool is made first, because queues and copier post to it. It must
// also end first, because its threads run their code. Members would end in reverse order, so the destructor states the
// order.
struct Engine::Impl::Machine {
  Machine() = default;
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  ~Machine() {
    pipeline.reset();      // Borrows all others.
    pool.reset();          // Its threads use the queues and the copier.
    workers.reset();       // Wakes the disk's queue.
    disk_threads.reset();  // Wakes the ring.
    ring.reset();          // Has registered the slots with the kernel.
    copier.reset();        // Has page-locked the slots for all devices.
    staging.reset();
  }

  internal::DiskQueue& disk() { return ring ? static_cast<internal::DiskQueue&>(*ring) : *disk_threads; }

  std::optional<internal::Staging> staging;
  std::optional<internal::Pool> pool;
  std::unique_ptr<internal::Copier> copier;
  std::unique_ptr<internal::Ring> ring;
  std::optional<internal::DiskThreads> disk_threads;
  std::optional<internal::Workers> workers;
  std::optional<internal::Pipeline> pipeline;
};

Engine::Impl::Impl(EngineOptions options) : options_(checked(std::move(options))), number_(next_engine.fetch_add(1)) {
  std::promise<void> promise;
  auto ready = promise.get_future();
  try {
    driver_ = internal::start_thread("flashpack-drive", [this, moved = std::move(promise)]() mutable { drive(moved); });
  } catch (const std::system_error& error) {
    throw internal::operation_error("start engine", error);
  }
  try {
    ready.get();
  } catch (...) {
    driver_.join();
    throw;
  }
}

Engine::Impl::~Impl() {
  pipeline_->inbox().close();
  driver_.join();
  if (successor_.joinable()) successor_.join();
}

const internal::Staging& Engine::Impl::make_staging(Machine& machine, std::uint32_t slots, std::uint32_t spare_slots) {
  const std::uint32_t chunk_bytes = options_.chunk_bytes;
  if (!options_.staging.empty())
    return machine.staging.emplace(options_.staging, chunk_bytes, std::uint64_t{spare_slots} * chunk_bytes);
  int node = options_.numa_node.value_or(-1);
  if (options_.device.kind == Device::Kind::kCuda && !options_.numa_node)
    node = internal::numa_node_of_cuda_device(options_.device.index);
  if (node >= 0) options_.numa_node = node;
  return machine.staging.emplace(std::uint64_t{slots + spare_slots} * chunk_bytes, chunk_bytes, node);
}

void Engine::Impl::build(Machine& machine) {
  bind_this_thread(options_.cpu_affinity);
  const bool cuda = options_.device.kind == Device::Kind::kCuda;
  const auto slots = static_cast<std::uint32_t>(slots_in(options_));
  // On the host, as many spare slots take the place of stuck ones; they take no memory until they are used. Slots for a
  // device are page-locked and would take memory at once, so there are no spare ones.
  const std::uint32_t spare_slots = cuda ? 0 : slots;
  const internal::Staging& staging = make_staging(machine, slots, spare_slots);
  machine.pool.emplace(options_.workers);
  if (cuda) {
    machine.copier =
        internal::make_cuda_copier(cuda_devices(options_), staging.slots(), *machine.pool, !options_.staging.empty());
  }
  // Each worker has the next work of a kind waiting when it is through, also while the driver sleeps. Four for each are
  // a bound on the work that a cancel waits for, and were not compared with other numbers. One of two workers
  // gathers as fast as the disk writes, and two at a time take a quarter more CPU time for the same bytes.
  const internal::Pipeline::Limits limits{.queue_depth = options_.queue_depth,
                                          .worker_depth = 4 * options_.workers,
                                          .gathers = std::max(1u, options_.workers / 2),
                                          .chunk_bytes = options_.chunk_bytes,
                                          .slots = slots,
                                          .at_once_bytes = kAtOnceBytes};
  const unsigned tags = internal::Pipeline::tag_limit(limits);
  try {
    machine.ring = make_ring(options_.backend, tags, {staging.slots().begin(), staging.slots().begin() + slots});
    if (machine.ring) fallback_reason_ = machine.ring->fallback_reason();
  } catch (const std::system_error& error) {
    if (options_.backend != Backend::kAuto) throw;
    fallback_reason_ = error.what();
  }
  internal::Ring* const ring = machine.ring.get();
  if (options_.backend == Backend::kAuto) options_.backend = ring ? Backend::kIoUring : Backend::kWorkers;
  internal::DiskThreads& threads = machine.disk_threads.emplace(*machine.pool, tags, ring, fallback_reason_);
  machine.workers.emplace(*machine.pool, tags, &machine.disk());
  internal::add_reason(fallback_reason_, staging.fallback_reason());
  const internal::Queues queues{.disk = machine.disk(), .stand_in = threads, .workers = *machine.workers};
  const internal::Tracer tracer{.sink = options_.trace, .engine = number_};
  machine.pipeline.emplace(queues, *machine.pool, machine.copier.get(), staging.slots(), limits, tracer);
}

// A ring can only be used by the thread that made it, so the driver thread makes everything.
void Engine::Impl::drive(std::promise<void>& ready) {
  auto machine = std::make_unique<Machine>();
  try {
    build(*machine);
  } catch (const Error&) {
    return ready.set_exception(std::current_exception());
  } catch (const std::system_error& error) {
    return ready.set_exception(std::make_exception_ptr(internal::operation_error("start engine", error)));
  } catch (...) {
    return ready.set_exception(std::current_exception());
  }
  machine_ = std::move(machine);
  pipeline_ = &*machine_->pipeline;
  backend_ = options_.backend;
  facts_ = {.number = number_,
            .chunk_bytes = options_.chunk_bytes,
            .at_once_bytes = kAtOnceBytes,
            .backend = options_.backend,
            .disk = &machine_->disk(),
            .copier = machine_->copier.get(),
            .page_policy = options_.memory_pool.pages_.get(),
            .fallback_reason = machine_->staging->fallback_reason()};
  ready.set_value();
  run();
}

// A sandbox that refuses the ring may refuse to close the ring. The kernel closes it when its thread ends, so another
// thread continues.
void Engine::Impl::run() {
  while (!machine_->pipeline->run()) {
    backend_ = Backend::kWorkers;
    try {
      successor_ = internal::start_thread("flashpack-drive", [this] { run(); });
      return;
    } catch (const std::system_error&) {  // The system has no more threads, so this one goes on with the operations
                                          // that come back.
    }
  }
  machine_.reset();
}

std::uint64_t Engine::Impl::pinned_bytes() const noexcept {
  return facts_.copier && facts_.copier->locked() ? slots_in(options_) * options_.chunk_bytes : 0;
}

void Engine::Impl::start(const std::shared_ptr<internal::TransferState>& state) { pipeline_->inbox().start(state); }

Engine::Engine(EngineOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
Engine::Engine(Engine&&) noexcept = default;

Engine& Engine::operator=(Engine&& other) noexcept {
  if (this != &other) {
    Engine old(std::move(*this));
    impl_ = std::move(other.impl_);
  }
  return *this;
}

Engine::~Engine() {
  // A forked child has no driver thread to stop, and releases nothing, as Engine promises.
  if (impl_ && !impl_->owner().is_current()) detail::leave_to_parent(impl_);
}

TransferStats Engine::load(LoadRequest request) { return start_load(std::move(request)).wait(); }

Transfer Engine::start_load(LoadRequest request, Completion* completion) {
  impl_->owner().require_current("engine");
  auto state = internal::prepare_load(impl_->facts(), std::move(request), completion);
  const internal::PartResult* const result = state->driver.result_if_read();
  if (result && !completion && !options().trace) {
    state->driver.stats.backend = impl_->backend();
    state->add(*result);
    state->finish(std::nullopt);  // Nobody is to be told on the driver thread, so it need not be woken.
  } else {
    impl_->start(state);
  }
  return internal::TransferState::handle(std::move(state));
}

FileHandle Engine::open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected, int fd) {
  impl_->owner().require_current("engine");
  internal::File file =
      internal::File::open(path, expected, true, fd < 0 ? internal::UniqueFd() : internal::duplicate(fd, path));
  internal::FileUse use(std::move(file), impl_->facts().disk, impl_->facts().number);
  use->residency.emplace(use->file.buffered_fd());
  return internal::FileUse::handle(std::move(use));
}

FileHandle Engine::open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected, int fd,
                        std::error_code& error) noexcept {
  return internal::value_or_code<FileHandle>(error, [&] { return open(path, expected, fd); });
}

std::optional<Engine> Engine::make(EngineOptions options, std::error_code& error) noexcept {
  return internal::value_or_code<std::optional<Engine>>(error, [&] { return Engine(std::move(options)); });
}

Transfer Engine::start_load(LoadRequest request, Completion* completion, std::error_code& error) noexcept {
  return internal::value_or_code<Transfer>(error, [&] { return start_load(std::move(request), completion); });
}

std::optional<FileWriter> Engine::create(const std::filesystem::path& path, WriterOptions options,
                                         std::error_code& error) noexcept {
  return internal::value_or_code<std::optional<FileWriter>>(error, [&] { return create(path, options); });
}

FileWriter Engine::create(const std::filesystem::path& path, WriterOptions options) {
  impl_->owner().require_current("engine");
  return FileWriter(std::make_unique<FileWriter::Impl>(*impl_, path, options));
}

const EngineOptions& Engine::options() const { return impl_->options(); }
std::uint64_t Engine::pinned_bytes() const { return impl_->pinned_bytes(); }
const std::string& Engine::fallback_reason() const { return impl_->fallback_reason(); }

}  // namespace flashpack
