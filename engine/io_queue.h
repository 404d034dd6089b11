/// The interfaces through which the pipeline has direct I/O carried out.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

namespace flashpack::internal {

/// One read or write past the page cache. It is tried once, so the result may be short.
struct DiskRequest {
  enum class Op : std::uint8_t { kRead, kWrite };
  Op op;
  int fd;
  std::uint64_t offset_bytes = 0;
  std::span<std::byte> memory;
  bool may_block = false;  ///< The operation may block, so the thread that calls push() or wait() must not try it.
  int slot = -1;           ///< The slot that `memory` lies in, for queues that register slots with the kernel.
  const void* transfer = nullptr;  ///< Operations of one transfer may be reported together.
};

struct IoCompletion {
  unsigned tag;
  std::int64_t result;  ///< Number of bytes, or -errno.
};

/// Keeps many operations in flight, each known by its tag. Each derived interface adds a push(), for requests of its
/// own type. Thread safety: push(), cancel() and wait() from one thread; wake() from any.
class Queue {
 public:
  virtual ~Queue() = default;

  /// Asks for an operation to end early, if it is in flight. Its completion still comes, with -ECANCELED or with its
  /// usual result. A read that a device has begun does not end sooner.
  virtual void cancel(unsigned tag) = 0;

  /// Blocks until there is a completion, wake() has been called since the last wait(), or `timeout` has passed. Without
  /// a timeout it waits for ever; with zero it only looks. The result is valid until the next call.
  virtual std::span<const IoCompletion> wait(std::optional<std::chrono::nanoseconds> timeout) = 0;

  /// Makes the current or the next wait() return.
  virtual void wake() noexcept = 0;
};

class DiskQueue : public Queue {
 public:
  /// The most tags that any of them serves. The kernel gives a ring at most 32,768 entries (IORING_MAX_ENTRIES), and a
  /// ring has three for each tag and one of its own.
  static constexpr unsigned kMostTags = (32768 - 1) / 3;

  using Request = DiskRequest;
  /// Starts an operation, at the latest with the next wait(). Requires: `tag` is below the limit given at construction,
  /// and not in flight; all memory stays valid until the completion.
  virtual void push(unsigned tag, const DiskRequest& request) = 0;

  /// Whether the kernel takes no more operations; then none must be pushed. Operations in flight complete with -EAGAIN
  /// once the kernel does not touch their memory any more.
  virtual bool refuses() const noexcept { return false; }

  /// Why this queue is slower than it could be; empty when it is not.
  virtual std::string fallback_reason() const { return {}; }
};

}  // namespace flashpack::internal
