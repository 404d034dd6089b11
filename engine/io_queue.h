/// The seam between the loop and whatever carries out its operations.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "engine/plan.h"

namespace flashpack::internal {

class StripeSums;

struct IoRequest {
  enum class Op : std::uint8_t {
    kRead,            ///< File to `memory`, once: the result may be short.
    kWrite,           ///< `memory` to file, once: the result may be short.
    kReadFragments,   ///< File to `fragments`, to the end: the sum of their sizes unless the file ends before; see
                      ///< PageCache.
    kWriteFragments,  ///< `fragments` to file, to the end.
    kScatter,         ///< `memory`, which holds the file from `offset_bytes` on, to `fragments`.
    kGather,          ///< `fragments` to `memory`, which is zeros where there are none.
    kChecksum,        ///< Counts what lies in `memory` at the places of `fragments`, see `sums`.
    kPopulate,        ///< Page faults of `memory` taken ahead of direct I/O; never fails.
  };
  /// What a kReadFragments may do with the page cache.
  struct PageCache {
    bool only = false;  ///< Never waits for the disk: -EAGAIN when a byte is not cached or past the end.
    bool drop = false;  ///< What was read is taken out of it, but for what shares a large page with something else.
  };
  Op op;
  int fd = -1;
  std::uint64_t offset_bytes = 0;
  std::span<std::byte> memory;
  std::span<const Fragment> fragments;
  PageCache page_cache;
  bool may_block = false;    ///< Of a kRead: it must not be tried in the thread that pushes or waits.
  bool for_writing = false;  ///< Of a kPopulate: somebody is going to write to `memory`.
  bool readable = false;     ///< Of a kChecksum: `memory` has been read or written by somebody already.
  /// Where bytes that pass are counted: those of the fragments and, of kScatter and kChecksum, what lies between them.
  StripeSums* sums = nullptr;
  int slot = -1;  ///< The staging slot that `memory` lies in, for queues that register slots with the kernel.
  const void* transfer = nullptr;  ///< Operations of one transfer may be reported together.
};

struct IoCompletion {
  unsigned tag;
  std::int64_t result;  ///< Bytes, or -errno.
};

/// Many operations in flight, each known by its tag.
/// Thread safety: push(), cancel() and wait() from one thread; wake() from any.
class IoQueue {
 public:
  virtual ~IoQueue() = default;

  /// Queues one operation; it is under way by the next wait() at the latest.
  /// Requires: `tag` is below the limit given at construction and not in flight; all memory stays valid until
  /// completion.
  virtual void push(unsigned tag, const IoRequest& request) = 0;

  /// Asks for an operation to end early, if it is in flight. Its completion comes all the same, perhaps with
  /// -ECANCELED, perhaps as if nothing had been asked, and no sooner for a read that a device has already got.
  virtual void cancel(unsigned tag) = 0;

  /// Blocks until there is a completion, wake() was called since the last wait(), or `timeout` has passed; none waits
  /// for ever, zero only looks. The result is valid until the next call.
  virtual std::span<const IoCompletion> wait(std::optional<std::chrono::nanoseconds> timeout) = 0;

  /// Makes the current or the next wait() return.
  virtual void wake() noexcept = 0;

  /// Whether the kernel takes no operations any more, so that none must be pushed. What is in flight comes back with
  /// -EAGAIN, as soon as the kernel does not touch its memory any more.
  virtual bool refuses() const noexcept { return false; }

  /// Why this queue works less well than it could; empty when it does not.
  virtual const std::string& fallback_reason() const noexcept = 0;
};

}  // namespace flashpack::internal
