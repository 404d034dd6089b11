/// Moves the chunks of all transfers on their ways.
#pragma once

#include <array>
#include <chrono>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "engine/copier.h"
#include "engine/file_tasks.h"
#include "engine/inbox.h"
#include "engine/open_parts.h"
#include "engine/pool.h"
#include "engine/profiler_ranges.h"
#include "engine/steps.h"
#include "engine/transfer_state.h"

namespace flashpack::internal {

/// Serves transfers: has their files opened, chooses which chunk starts next, and ends them. Steps takes each chunk the
/// way that the table in way.cc gives.
///
/// Threads of the pool open a file when its turn comes, a bounded number at a time, and close it when its bytes have
/// been moved, because both may block in the file system. If little of a file is wanted and all of it is cached, the
/// thread that opens the file reads it, too, and the driver sees no chunk of it.
///
/// A file system that does not answer delays only the transfers of its own files. Jobs limits the operations and slots
/// that it may have meanwhile, and OpenParts the open files.
///
/// One thread, the driver, calls run(). It never blocks in a file system, allocates nothing per chunk, and leaves all
/// work on bytes to others, except that a copier may clear the gaps of a chunk in which few extents lie.
class Pipeline final : private Steps::Owner {
 public:
  struct Limits {
    std::uint32_t queue_depth;   ///< Direct reads and writes in flight, including chunks whose slots are being filled.
    std::uint32_t worker_depth;  ///< Operations of each kind that the workers have at a time; enough to keep them busy
                                 ///< while the driver sleeps.
    std::uint32_t chunk_bytes;
    std::uint32_t slots;  ///< Slots in use at a time; further slots take the place of stuck ones.
    /// A part of at most this size is read by the thread that opens its file, if cached.
    std::uint32_t at_once_bytes = 0;
  };

  /// The tag limit that the queues of such a pipeline need.
  static unsigned tag_limit(Limits limits);

  /// Borrows the queues, the pool, the copier and the slots' memory, which must outlive it. Threads of the pool may use
  /// queues, copier and slots even later, so the pool must be destroyed before these. `copier` is null for an engine of
  /// the host. `tracer` is told of each step.
  Pipeline(Queues queues, Pool& pool, Copier* copier, std::vector<std::span<std::byte>> slots, Limits limits,
           Tracer tracer = {});

  /// Where any thread hands prepared transfers to the driver, and lets run() return when all of them have ended.
  Inbox& inbox() const noexcept { return files_.inbox(); }

  /// Returns true when all transfers have ended after Inbox::close(). Returns false once, if the disk's queue begins to
  /// refuse: its operations come back only after the thread that made the queue has ended, so another thread must call
  /// run() again.
  bool run();

 private:
  // The loop: pipeline.cc.
  bool finished();
  std::optional<std::chrono::nanoseconds> patience(bool look_again);
  void look_for_late();
  void attend_to_gates();
  bool issue();
  void issue_from(Part& part, unsigned& questions, std::uint32_t queue_depth);

  // Transfers and their parts: pipeline_parts.cc.
  void admit();
  void admit(const std::shared_ptr<TransferState>& started);
  void admit(Part& part);
  void expire();
  void open(Part& part);
  void close(Part& part);
  void on_answer(Inbox::Answer& answer);
  void on_opened(Part& part, Opened opened);
  void note_fallbacks(Part& part);
  bool may_leave_open(const Part& part) const;
  void begin_issuing(Part& part);
  void issue_from_now_on(Part& part);
  std::vector<Part*>& issuing_like(const Part& part);
  void on_all_back(Part& part);
  bool let_go(Part& part, bool late);
  void stop_waiting_for(Part& part, bool late = false);
  void look_for_late_parts();
  void fail(Part& part, const Error& error);
  void give_up(TransferState& transfer, const Error& error);
  void give_up(Part& part);
  void end_if_idle(TransferState& transfer);
  void tell_of_end(const TransferState& transfer, const std::optional<Failure>& failure) const;
  void end(TransferState& transfer);

  // Steps calls these when chunks end; they are in pipeline_parts.cc, too.
  void on_delivered(Part& part, const Chunk& chunk) override;
  void on_given_back(Part& part) override { issue_from_now_on(part); }
  void on_failed(Part& part, const Error& error) override { fail(part, error); }
  void on_came_back(Part& part) override;

  const Queues queues_;
  Pool& pool_;
  Copier* const copier_;
  const Limits limits_;
  const Tracer tracer_;
  const ProfilerRanges ranges_;
  FileTasks files_;
  Steps steps_;
  OpenParts parts_;
  std::chrono::steady_clock::time_point now_;  // Time at the start of this turn of the loop.
  std::chrono::steady_clock::time_point looked_for_late_;

  std::size_t unfinished_ = 0;  // Transfers that have not ended.
  std::uint64_t next_turn_ = 0;
  std::uint64_t next_number_ = 1;  // Of a transfer.
  static constexpr std::size_t kSmall = 0;
  static constexpr std::size_t kLarge = 1;
  std::array<std::vector<Part*>, 2> issuing_;  // Parts with chunks to issue, sorted by turn.
  std::set<std::pair<Deadline, TransferState*>> deadlines_;
  std::vector<TransferState*> gated_;                    // Transfers with a shut gate.
  std::chrono::steady_clock::time_point gates_changed_;  // When a transfer was last added or removed.
  Inbox::Messages messages_;                             // Used in admit() only.
};

}  // namespace flashpack::internal
