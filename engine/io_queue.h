/// The seams between the loop and whatever carries out its operations: a disk queue moves bytes between a file and
/// memory, a work queue does what takes a CPU.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "engine/byte_work.h"

namespace flashpack::internal {

/// One read or write past the page cache, tried once: the result may be short.
struct DiskRequest {
  enum class Op : std::uint8_t { kRead, kWrite };
  Op op;
  int fd;
  std::uint64_t offset_bytes = 0;
  std::span<std::byte> memory;
  bool may_block = false;          ///< It must not be tried in the thread that pushes or waits.
  int slot = -1;                   ///< The slot that `memory` lies in, for queues that register slots with the kernel.
  const void* transfer = nullptr;  ///< Operations of one transfer may be reported together.
};

struct IoCompletion {
  unsigned tag;
  std::int64_t result;  ///< Bytes, or -errno.
};

/// Many operations in flight, each known by its tag. A push() of an operation puts it under way by the next wait() at
/// the latest. It requires that `tag` is below the limit given at construction and not in flight, and that all memory
/// stays valid until completion.
/// Thread safety: push(), cancel() and wait() from one thread; wake() from any.
class Queue {
 public:
  virtual ~Queue() = default;

  /// Asks for an operation to end early, if it is in flight. Its completion comes all the same, perhaps with
  /// -ECANCELED, perhaps as if nothing had been asked, and no sooner for a read that a device has already got.
  virtual void cancel(unsigned tag) = 0;

  /// Blocks until there is a completion, wake() was called since the last wait(), or `timeout` has passed; none waits
  /// for ever, zero only looks. The result is valid until the next call.
  virtual std::span<const IoCompletion> wait(std::optional<std::chrono::nanoseconds> timeout) = 0;

  /// Makes the current or the next wait() return.
  virtual void wake() noexcept = 0;
};

class DiskQueue : public Queue {
 public:
  using Request = DiskRequest;
  virtual void push(unsigned tag, const DiskRequest& request) = 0;

  /// Whether the kernel takes no operations any more, so that none must be pushed. What is in flight comes back with
  /// -EAGAIN, as soon as the kernel does not touch its memory any more.
  virtual bool refuses() const noexcept { return false; }

  /// Why this queue works less well than it could; empty when it does not.
  virtual std::string fallback_reason() const { return {}; }
};

class WorkQueue : public Queue {
 public:
  using Request = ByteWork;
  virtual void push(unsigned tag, const ByteWork& work) = 0;
};

/// The queues of one pipeline; they outlive it.
struct Queues {
  DiskQueue& disk;      ///< Serves files; the driver sleeps in it, and the others wake it.
  DiskQueue& stand_in;  ///< Serves files when `disk` begins to refuse. The same, where it never does.
  WorkQueue& workers;
};

}  // namespace flashpack::internal
