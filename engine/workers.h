/// Queues whose work the threads of a pool do: byte work and, where io_uring is refused, direct I/O.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "engine/pool.h"
#include "engine/work_queue.h"

namespace flashpack::internal {

/// Carries out `request` in the calling thread, which may be any thread. Returns an IoCompletion::result: the bytes of
/// one call, which may be fewer than wanted, or -errno. May block.
std::int64_t carry_out(const DiskRequest& request);

/// A queue whose requests the threads of a pool carry out. Thread safety: as Queue.
template <class Interface>
class ThreadQueue : public Interface {
 public:
  using Request = typename Interface::Request;

  /// Tags are below `tag_limit`. `pool` is borrowed. If the owner sleeps in another queue, it passes that as
  /// `listener`, which is then woken for completions and must outlive this.
  ThreadQueue(Pool& pool, unsigned tag_limit, Queue* listener);
  /// Requires: nothing is in flight.
  ~ThreadQueue() override = default;

  void push(unsigned tag, const Request& request) final;
  /// An operation that no thread has begun is not carried out.
  void cancel(unsigned tag) final;
  std::span<const IoCompletion> wait(std::optional<std::chrono::nanoseconds> timeout) final;
  void wake() noexcept final;

 private:
  struct Work final : Pool::Task {
    void run() noexcept override { queue->carry_out(*this); }

    ThreadQueue* queue = nullptr;
    unsigned tag = 0;
    Request request{};
    bool in_flight = false;  // Only for the owner.
    bool cancelled = false;  // Protected by ThreadQueue::mutex_.
  };

  void carry_out(Work& work) noexcept;
  bool worth_waking(const Request& done) const;

  Pool& pool_;
  Queue* const listener_;
  std::vector<Work> work_;           // One for each tag.
  std::vector<IoCompletion> taken_;  // Only for the owner: the last result of wait().
  // Whether wait() would return something or has been woken. It is set under the mutex before the owner is woken, so
  // that an owner that has been woken sees it. It is sequentially consistent, so that an owner need not take the lock
  // when there is nothing.
  std::atomic<bool> any_ = false;

  std::mutex mutex_;  // Protects the rest.
  std::condition_variable owner_wanted_;
  // Requests that no thread has begun. There are at most a dozen for each thread, so that a search costs
  // less than the lists of another container would.
  std::vector<const Request*> queued_;
  std::vector<IoCompletion> finished_;
  bool woken_ = false;
};

/// The byte work of one pipeline.
using Workers = ThreadQueue<WorkQueue>;

/// Direct I/O by pread and pwrite.
class DiskThreads final : public ThreadQueue<DiskQueue> {
 public:
  /// `reason` says why a ring does not serve the files; empty if no ring was asked for.
  DiskThreads(Pool& pool, unsigned tag_limit, Queue* listener, std::string reason = {})
      : ThreadQueue(pool, tag_limit, listener), reason_(std::move(reason)) {}

  std::string fallback_reason() const override { return reason_; }

 private:
  const std::string reason_;
};

}  // namespace flashpack::internal
