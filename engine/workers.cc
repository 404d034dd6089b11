#include "engine/workers.h"

#include <algorithm>
#include <cassert>
#include <cerrno>

namespace flashpack::internal {

namespace {

// Whether a request moves bytes of a file.
bool moves(const DiskRequest&) { return true; }
bool moves(const ByteWork& work) { return work.op == ByteWork::Op::kFromCache || work.op == ByteWork::Op::kToCache; }

}  // namespace

std::int64_t carry_out(const DiskRequest& request) {
  return move_once(request.fd, request.offset_bytes, request.memory, request.op == DiskRequest::Op::kWrite);
}

template <class Interface>
ThreadQueue<Interface>::ThreadQueue(Pool& pool, unsigned tag_limit, Queue* listener)
    : pool_(pool), listener_(listener), work_(tag_limit) {
  for (unsigned tag = 0; tag < tag_limit; ++tag) {
    work_[tag].queue = this;
    work_[tag].tag = tag;
  }
  taken_.reserve(tag_limit);
  finished_.reserve(tag_limit);
  queued_.reserve(tag_limit);
}

template <class Interface>
void ThreadQueue<Interface>::push(unsigned tag, const Request& request) {
  assert(tag < work_.size() && !work_[tag].in_flight);
  Work& work = work_[tag];
  work.in_flight = true;
  work.request = request;
  work.subject = request.fd < 0 ? 0 : static_cast<Pool::Subject>(request.fd) + 1;
  {
    const std::lock_guard lock(mutex_);
    work.cancelled = false;
    queued_.push_back(&work.request);
  }
  pool_.post(work);
}

template <class Interface>
void ThreadQueue<Interface>::cancel(unsigned tag) {
  Work& work = work_[tag];
  {
    const std::lock_guard lock(mutex_);
    if (std::find(queued_.begin(), queued_.end(), &work.request) == queued_.end()) return;
    work.cancelled = true;
  }
  pool_.set_free(work);  // This has no effect if a thread has begun the task by now.
}

template <class Interface>
std::span<const IoCompletion> ThreadQueue<Interface>::wait(std::optional<std::chrono::nanoseconds> timeout) {
  taken_.clear();
  if (timeout && timeout->count() <= 0 && !any_) return taken_;
  std::unique_lock lock(mutex_);
  const auto ready = [this] { return !finished_.empty() || woken_; };
  if (!timeout) {
    owner_wanted_.wait(lock, ready);
  } else if (timeout->count() > 0) {
    owner_wanted_.wait_for(lock, *timeout, ready);
  }
  woken_ = false;
  any_ = false;
  taken_.swap(finished_);
  for (const IoCompletion& completion : taken_) work_[completion.tag].in_flight = false;
  return taken_;
}

template <class Interface>
void ThreadQueue<Interface>::wake() noexcept {
  {
    const std::lock_guard lock(mutex_);
    woken_ = true;
    any_ = true;
  }
  owner_wanted_.notify_one();
}

// Whether the owner is woken for this completion. A wake costs time of both threads (engine_bench, cost/wake). So a
// read or write does not wake the owner while its transfer keeps every thread busy, because a later one of that
// transfer will. All other work wakes at once, because the disk may wait for it.
template <class Interface>
bool ThreadQueue<Interface>::worth_waking(const Request& done) const {
  const auto same = [&](const Request* queued) { return queued->transfer == done.transfer; };
  return !moves(done) || std::count_if(queued_.begin(), queued_.end(), same) < std::ptrdiff_t{pool_.thread_count()};
}

template <class Interface>
void ThreadQueue<Interface>::carry_out(Work& work) noexcept {
  bool cancelled = false;
  {
    const std::lock_guard lock(mutex_);
    std::erase(queued_, &work.request);
    cancelled = work.cancelled;
  }
  const std::int64_t result = cancelled ? -ECANCELED : internal::carry_out(work.request);
  // Wakes under the lock, because the owner may be gone as soon as it knows of the last completion.
  const std::lock_guard lock(mutex_);
  finished_.push_back({work.tag, result});
  any_ = true;
  if (!worth_waking(work.request)) return;
  listener_ ? listener_->wake() : owner_wanted_.notify_one();
}

template class ThreadQueue<WorkQueue>;
template class ThreadQueue<DiskQueue>;

}  // namespace flashpack::internal
