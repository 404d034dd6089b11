#include "engine/transfer_state.h"

#include <algorithm>
#include <cassert>
#include <utility>

#include "engine/ground/reasons.h"

namespace flashpack::internal {

void TransferEnd::reach(std::optional<Failure> failure, TransferStats stats) {
  const std::lock_guard lock(mutex_);
  failure_ = std::move(failure);
  stats_ = std::move(stats);
  reached_ = true;
  reached_by_ = std::this_thread::get_id();
}

void TransferEnd::publish() {
  {
    const std::lock_guard lock(mutex_);
    published_ = true;
  }
  published_changed_.notify_all();
}

bool TransferEnd::reached() const {
  const std::lock_guard lock(mutex_);
  return reached_;
}

bool TransferEnd::is_visible([[maybe_unused]] const Lock& lock) const {
  assert(lock.owns_lock());
  return published_ || (reached_ && std::this_thread::get_id() == reached_by_);
}

bool TransferEnd::is_visible() const { return is_visible(Lock(mutex_)); }

void TransferEnd::wait() const {
  Lock lock(mutex_);
  published_changed_.wait(lock, [&] { return is_visible(lock); });
}

bool TransferEnd::wait_for(std::chrono::nanoseconds duration) const {
  Lock lock(mutex_);
  // The sum of now and a very long duration would overflow.
  const auto bounded = std::min<std::chrono::nanoseconds>(duration, std::chrono::hours(24 * 365));
  return published_changed_.wait_for(lock, bounded, [&] { return is_visible(lock); });
}

const Failure* TransferEnd::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_ ? &*failure_ : nullptr;
}

TransferStats TransferEnd::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void DriverState::note_fallback(std::string_view reason) { add_reason(stats.fallback_reason, reason); }

std::filesystem::path DriverState::path() const {
  return parts.empty() ? std::filesystem::path() : parts.front().request.path;
}

const PartResult* DriverState::result_if_read() const {
  if (parts.size() != 1) return nullptr;
  const PartResult* const result = parts.front().handover.result();
  return result && !result->failure ? result : nullptr;
}

const StripeSums* DriverState::sums() const {
  const std::optional<StripeSums>& sums = parts.front().planned->sums;
  return sums ? &*sums : nullptr;
}

void TransferState::add(const PartResult& result) {
  driver.stats.verified_bytes += result.verified_bytes;
  driver.stats.buffered_bytes += result.read_bytes;
  driver.stats.operations += result.read_bytes > 0;
  driver.note_fallback(result.fallback_reason);
  done_bytes += result.read_bytes;
}

void TransferState::finish(std::optional<Failure> result) {
  driver.stats.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  {
    const std::lock_guard lock(inbox_mutex_);
    inbox_ = nullptr;
  }
  end.reach(std::move(result), driver.stats);
  if (request.completion) {
    Transfer transfer = handle(shared_from_this());
    request.completion->done(transfer);
  }
  end.publish();
}

}  // namespace flashpack::internal
