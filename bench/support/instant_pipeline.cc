#include "bench/support/instant_pipeline.h"

#include <pthread.h>

#include <condition_variable>
#include <ctime>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "engine/pipeline.h"
#include "engine/prepare.h"
#include "engine/staging.h"
#include "engine/thread.h"

namespace flashpack::bench {

namespace {

std::int64_t bytes_of(const internal::DiskRequest& request) { return static_cast<std::int64_t>(request.memory.size()); }

std::int64_t bytes_of(const internal::ByteWork& work) {
  std::uint64_t bytes = 0;
  for (const internal::Fragment& fragment : work.fragments) bytes += fragment.size_bytes;
  return static_cast<std::int64_t>(bytes);
}

template <class Interface>
class InstantQueue final : public Interface {
 public:
  /// `listener` is the queue that the owner sleeps in, when that is another one.
  explicit InstantQueue(internal::Queue* listener = nullptr) : listener_(listener) {}

  void push(unsigned tag, const typename Interface::Request& request) override {
    pushed_.push_back({tag, bytes_of(request)});
    if (listener_) listener_->wake();
  }
  void cancel(unsigned) override {}

  std::span<const internal::IoCompletion> wait(std::optional<std::chrono::nanoseconds> timeout) override {
    done_.clear();
    done_.swap(pushed_);
    std::unique_lock lock(mutex_);
    const auto woken = [this] { return woken_; };
    if (done_.empty() && !timeout) woken_changed_.wait(lock, woken);
    if (done_.empty() && timeout && timeout->count() > 0) woken_changed_.wait_for(lock, *timeout, woken);
    woken_ = false;
    return done_;
  }

  void wake() noexcept override {
    const std::lock_guard lock(mutex_);
    woken_ = true;
    woken_changed_.notify_one();
  }

 private:
  internal::Queue* const listener_;
  std::vector<internal::IoCompletion> pushed_;
  std::vector<internal::IoCompletion> done_;

  std::mutex mutex_;  // Protects the rest.
  std::condition_variable woken_changed_;
  bool woken_ = false;
};

constexpr std::uint32_t kChunkBytes = 4 << 20;
constexpr internal::Pipeline::Limits kLimits{
    .queue_depth = 8, .worker_depth = 8, .chunk_bytes = kChunkBytes, .slots = 16};

}  // namespace

struct InstantPipeline::Impl {
  Impl() : driver(internal::start_thread("flashpack-drive", [this] { pipeline.run(); })) {}
  ~Impl() {
    pipeline.inbox().close();
    driver.join();
  }

  const internal::EngineFacts facts{.chunk_bytes = kChunkBytes};
  internal::Staging staging{std::uint64_t{kLimits.slots} * kChunkBytes, kChunkBytes};
  InstantQueue<internal::DiskQueue> disk;
  InstantQueue<internal::WorkQueue> workers{&disk};
  internal::Pool pool{2};  // Opens and closes files.
  internal::Pipeline pipeline{{disk, disk, workers}, pool, nullptr, staging.slots(), kLimits};
  std::thread driver;
};

InstantPipeline::InstantPipeline() : impl_(std::make_unique<Impl>()) {}
InstantPipeline::~InstantPipeline() = default;

TransferStats InstantPipeline::load(LoadRequest request) {
  auto state = internal::prepare_load(impl_->facts, std::move(request), nullptr);
  impl_->pipeline.inbox().start(state);
  return internal::TransferState::handle(std::move(state)).wait();
}

double InstantPipeline::driver_cpu_seconds() const {
  clockid_t clock = 0;
  const int error = ::pthread_getcpuclockid(impl_->driver.native_handle(), &clock);
  timespec time{};
  if (error != 0 || ::clock_gettime(clock, &time) != 0) {
    throw std::system_error(error != 0 ? error : errno, std::generic_category(), "clock of the driver thread");
  }
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) / 1e9;
}

}  // namespace flashpack::bench
