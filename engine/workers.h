/// Byte work, and a small thread pool that does it: page-cache reads and writes, copies between slots and memory, page
/// faults; and, where io_uring is refused, the direct I/O of the pipeline too.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "engine/io_queue.h"

namespace flashpack::engine {

/// Does what `request` says, in the calling thread. Returns what IoCompletion::result says.
std::int64_t carry_out(const IoRequest& request);

/// Of a kGather: makes zeros of what no piece goes to. In a store these are little.
void clear_gaps(const IoRequest& request);

/// Whether all of `memory` has physical pages, so that Op::kPopulate would be for nothing. True also where the kernel
/// will not say; false where some of it is not mapped.
bool is_populated(std::span<std::byte> memory);

class Workers final : public IoQueue {
 public:
  /// Tags are below `tag_limit`. `listener`, if given, is woken after each completion, for an owner that sleeps in
  /// another queue; it must outlive this. `fallback_reason` says why the direct I/O of the pipeline comes here, when it
  /// does. Throws: std::system_error when threads cannot be had.
  Workers(unsigned thread_count, unsigned tag_limit, IoQueue* listener, std::string fallback_reason = {});
  /// Requires: nothing in flight.
  ~Workers() override;

  void push(unsigned tag, const IoRequest& request) override;
  /// Keeps an operation that no thread has begun from being carried out.
  void cancel(unsigned tag) override;
  std::span<const IoCompletion> wait(std::optional<std::chrono::nanoseconds> timeout) override;
  void wake() noexcept override;
  const std::string& fallback_reason() const noexcept override { return fallback_reason_; }

 private:
  void work();
  bool worth_waking(IoRequest::Op op) const;
  void stop();

  const unsigned thread_count_;
  std::vector<IoRequest> requests_;  // By tag; handed over with the tag, through mutex_.
  std::vector<IoCompletion> taken_;  // The owner's: the last result of wait().
  IoQueue* const listener_;
  const std::string fallback_reason_;

  std::mutex mutex_;  // Protects the rest but threads_.
  std::condition_variable work_wanted_;
  std::condition_variable owner_wanted_;
  std::vector<unsigned> queued_;  // A circle of tag_limit tags, so that nothing is allocated after construction.
  std::size_t queued_first_ = 0;
  std::size_t queued_count_ = 0;
  std::vector<bool> cancelled_;  // By tag.
  std::vector<IoCompletion> finished_;
  bool woken_ = false;
  bool stopping_ = false;

  std::vector<std::thread> threads_;
};

}  // namespace flashpack::engine
