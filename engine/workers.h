/// Byte work on a thread pool: page-cache reads and writes, copies between slots and memory, page faults; and, where
/// io_uring is refused, the direct I/O of the pipeline too.
#pragma once

#include <condition_variable>
#include <mutex>
#include <vector>

#include "engine/io_queue.h"
#include "engine/pool.h"

namespace flashpack::internal {

/// Does what `request` says, in the calling thread. Returns what IoCompletion::result says.
std::int64_t carry_out(const IoRequest& request);

/// Reads `fragments` from the page cache alone. 0, or an errno: then some of them may have been read, too. EOPNOTSUPP:
/// the file system cannot tell what would wait.
int read_without_waiting(int fd, std::span<const Fragment> fragments);

/// Of a kGather: makes zeros of what no fragment goes to. In a store these are little.
void clear_gaps(const IoRequest& request);

/// Whether all of `memory` has physical pages, so that Op::kPopulate would be for nothing. True also where the kernel
/// will not say; false where some of it is not mapped.
bool is_populated(std::span<std::byte> memory);

/// The byte work of one pipeline, by a pool of threads.
class Workers final : public IoQueue {
 public:
  /// Tags are below `tag_limit`. `pool` is borrowed. `listener`, if given, is woken for completions, for an owner that
  /// sleeps in another queue; it must outlive this. `fallback_reason` says why the direct I/O of the pipeline comes
  /// here, when it does.
  Workers(Pool& pool, unsigned tag_limit, IoQueue* listener, std::string fallback_reason = {});
  /// Requires: nothing in flight.
  ~Workers() override = default;

  void push(unsigned tag, const IoRequest& request) override;
  /// Keeps an operation that no thread has begun from being carried out.
  void cancel(unsigned tag) override;
  std::span<const IoCompletion> wait(std::optional<std::chrono::nanoseconds> timeout) override;
  void wake() noexcept override;
  const std::string& fallback_reason() const noexcept override { return fallback_reason_; }

 private:
  struct Work final : Pool::Task {
    void run() noexcept override { workers->carry_out(*this); }

    Workers* workers = nullptr;
    unsigned tag = 0;
    IoRequest request{};
    bool cancelled = false;  // Protected by Workers::mutex_.
  };

  void carry_out(Work& work) noexcept;
  bool worth_waking(const IoRequest& done) const;

  Pool& pool_;
  IoQueue* const listener_;
  const std::string fallback_reason_;
  std::vector<Work> work_;           // By tag.
  std::vector<IoCompletion> taken_;  // The owner's: the last result of wait().

  std::mutex mutex_;  // Protects the rest.
  std::condition_variable owner_wanted_;
  std::vector<const IoRequest*> queued_;  // No thread has begun these.
  std::vector<IoCompletion> finished_;
  bool woken_ = false;
};

}  // namespace flashpack::internal
