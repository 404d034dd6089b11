#include "bench/support/engine_parts.h"

#include <condition_variable>
#include <mutex>

#include "engine/pool.h"
#include "engine/residency.h"

namespace flashpack::bench {

std::function<bool(std::uint64_t, std::uint64_t)> cache_question(int buffered_fd) {
  const auto residency = std::make_shared<internal::Residency>(buffered_fd);
  return [residency](std::uint64_t offset_bytes, std::uint64_t size_bytes) {
    return residency->seems_cached(offset_bytes, size_bytes);
  };
}

struct PoolThread::Impl final : internal::Pool::Task {
  void run() noexcept override {
    const std::lock_guard lock(mutex);
    done = true;
    wanted.notify_one();
  }

  std::mutex mutex;
  std::condition_variable wanted;
  bool done = false;  // Protected by `mutex`.
  internal::Pool pool{1};
};

PoolThread::PoolThread() : impl_(std::make_unique<Impl>()) {}
PoolThread::~PoolThread() = default;

void PoolThread::wake() {
  impl_->pool.post(*impl_);
  std::unique_lock lock(impl_->mutex);
  impl_->wanted.wait(lock, [this] { return impl_->done; });
  impl_->done = false;
}

}  // namespace flashpack::bench
