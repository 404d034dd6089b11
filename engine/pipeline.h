/// Moves the chunks of all transfers on their ways.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "engine/copier.h"
#include "engine/inbox.h"
#include "engine/pool.h"
#include "engine/schedule.h"
#include "engine/steps.h"
#include "engine/tracer.h"
#include "engine/transfers.h"

namespace flashpack::internal {

/// The loop of one driver. In each turn Transfers begins and ends transfers and has their files opened, Schedule starts
/// chunks, and Steps takes each chunk the way that the table in way.cc gives.
///
/// One thread, the driver, calls run(). It never blocks in a file system, allocates nothing per chunk, takes a lock
/// only to hand work to the pool and to collect it, and leaves all work on bytes to others, except that a copier may
/// clear the gaps of a chunk in which few extents lie.
class Pipeline final {
 public:
  struct Limits {
    std::uint32_t queue_depth;   ///< Direct reads and writes; see Steps::has_room().
    std::uint32_t worker_depth;  ///< Operations of each kind that the workers have at a time; enough to keep them busy
                                 ///< while the driver sleeps.
    std::uint32_t gathers = 1;   ///< Chunks of stores that the workers copy to slots at a time.
    std::uint32_t chunk_bytes;
    std::uint32_t slots;  ///< Slots in use at a time; further slots take the place of stuck ones.
    /// A part of at most this size is read by the thread that opens its file, if cached.
    std::uint32_t at_once_bytes = 0;
  };

  /// The tag limit that the queues of such a pipeline need.
  static unsigned tag_limit(Limits limits);

  /// Borrows the queues, the pool, the copier and the slots' memory, which must outlive it. The pool must be destroyed
  /// before the queues, the copier and the slots, because its threads may use these when the pipeline is gone. `copier`
  /// is null for an engine of the host. `tracer` is told of each step.
  Pipeline(Queues queues, Pool& pool, Copier* copier, std::vector<std::span<std::byte>> slots, Limits limits,
           Tracer tracer = {});

  /// Where any thread hands prepared transfers to the driver, and lets run() return when all of them have ended.
  Inbox& inbox() const noexcept { return transfers_.inbox(); }

  /// Returns true when all transfers have ended after Inbox::close(). Returns false once, if the disk's queue begins to
  /// refuse: its operations come back only after the thread that made the queue has ended, so another thread must call
  /// run() again.
  bool run();

 private:
  std::optional<std::chrono::nanoseconds> patience(bool look_again) const;

  const Queues queues_;
  Copier* const copier_;
  Schedule schedule_;
  // The two borrow each other, and use each other only in run(). At their end no transfer and no job is under way.
  Transfers transfers_;
  Steps steps_;
};

}  // namespace flashpack::internal
