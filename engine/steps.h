/// Takes chunks through the steps of their ways.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <system_error>
#include <vector>

#include "engine/copier.h"
#include "engine/jobs.h"
#include "engine/work_queue.h"
#include "flashpack/error.h"

namespace flashpack::internal {

/// The queues of one pipeline; they outlive it.
struct Queues {
  DiskQueue& disk;      ///< Serves files. The driver sleeps in its wait(), and the other queues wake it.
  DiskQueue& stand_in;  ///< Serves files when `disk` refuses; may be `disk` itself.
  WorkQueue& workers;
};

/// The chunks that are under way. Each goes from step to step: the queue of the file does direct I/O, the workers do
/// all work that touches bytes with a CPU, and the copier copies to and from devices. Whoever starts chunks is told
/// how they end.
///
/// set_time() begins a turn, set_out() starts a chunk, reap() and look_at_gates() let chunks go on, and mark_late() and
/// abandon_chunks_of() are for those that do not. The other functions ask.
///
/// Thread safety: one thread, the driver. Nothing here allocates for a chunk, or blocks in a file system.
class Steps {
 public:
  /// The owner starts chunks, and Steps tells it how each of them ends, so that the owner can start others. Each
  /// callback may call set_out() and abandon_chunks_of().
  class Owner {
   public:
    /// All bytes of the chunk are where they belong, and it is not under way any more.
    virtual void on_delivered(Part& part, const Chunk& chunk) = 0;
    /// The router called the chunk cached, but it was not; the router has it again.
    virtual void on_given_back(Part& part) = 0;
    /// A chunk has failed, which fails its part.
    virtual void on_failed(Part& part, const Error& error) = 0;
    /// A chunk of a part that has failed has come back.
    virtual void on_came_back(Part& part) = 0;

   protected:
    ~Owner() = default;
  };
  using Time = std::chrono::steady_clock::time_point;
  using Route = ChunkTraits::Route;

  struct WorkerLimits {
    std::uint32_t depth;        ///< Operations of each kind that the workers have at a time.
    std::uint32_t gathers = 1;  ///< Chunks that they gather at a time.
  };

  /// Borrows all that it is given references and pointers to, and the slots' memory. `copier` is null for an engine of
  /// the host. `tracer` is told of each step.
  Steps(Owner& owner, Queues queues, Copier* copier, std::vector<std::span<std::byte>> slots, Jobs::Limits limits,
        WorkerLimits workers, Tracer tracer = {});

  /// To be called at the start of each turn: the time at which steps begin from now on.
  void set_time(Time now) { now_ = now; }
  /// Starts a chunk on its way. False, without any effect, if there is no tag, no slot or no worker for it now.
  /// Requires: may_have_more() and has_room(), which cost less than to find the next chunk.
  bool set_out(Part& part, const Chunk& chunk, Route route);
  /// False if the part's file or file system has its share of what is stuck, so that no chunk of it may start.
  bool may_have_more(const Part& part) const { return jobs_.may_have_more(part); }
  /// Whether one more chunk may start on that route. The disk has at most `queue_depth` chunks, including those that
  /// are still being gathered, or whose slots are still being populated; the workers have at most WorkerLimits::depth
  /// that go through the page cache.
  bool has_room(Route route, std::uint32_t queue_depth) const;
  /// How many chunks the workers may gather at a time.
  std::uint32_t gather_limit() const { return worker_limits_.gathers; }
  /// Whether no chunk is under way.
  bool idle() const { return jobs_.idle(); }

  /// Waits for operations to end, for at most that long or, without a time, for ever, and lets their chunks go on. Also
  /// returns when the disk's queue is woken.
  void reap(std::optional<std::chrono::nanoseconds> patience);
  /// Lets chunks that wait for gates go on if all have been opened or their part has failed.
  void look_at_gates();
  /// Finds the operations that have become late. Returns whether there are any.
  bool mark_late() { return jobs_.mark_late(now_); }
  /// Cancels the operations of a part that has failed. Copies are left to end by themselves. A chunk that waits for a
  /// gate has no operation, and look_at_gates() closes it in the next turn.
  void abandon_chunks_of(Part& part);

 private:
  bool has_pages(const Part& part, const Chunk& chunk, Step step) const;
  void begin(unsigned tag, Step step);
  void advance(unsigned tag);
  void move_direct(unsigned tag);
  void give_to_workers(unsigned tag);
  void complete(IoCompletion completion);
  void on_direct(unsigned tag, std::int64_t result);
  void on_buffered(unsigned tag, std::int64_t result);
  void on_worked(unsigned tag, std::error_code error);
  void refuse_direct(unsigned tag);
  void deliver(unsigned tag);
  void give_back(unsigned tag);
  void fail(unsigned tag, std::error_code code);
  void close_job(unsigned tag);

  Owner& owner_;
  const Queues queues_;
  Copier* const copier_;
  const WorkerLimits worker_limits_;
  const bool traced_;
  Jobs jobs_;
  Time now_;
};

}  // namespace flashpack::internal
