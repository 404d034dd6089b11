/// Begins and ends transfers, and has their files opened and closed.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <system_error>
#include <utility>

#include "engine/copier.h"
#include "engine/file_tasks.h"
#include "engine/gates.h"
#include "engine/inbox.h"
#include "engine/open_parts.h"
#include "engine/pool.h"
#include "engine/profiler_ranges.h"
#include "engine/schedule.h"
#include "engine/steps.h"
#include "engine/transfer_state.h"

namespace flashpack::internal {

/// The transfers that have started and not ended. A transfer ends when all of its parts have, and a part ends when its
/// bytes have been moved and its file has been checked and closed, or when it has failed and nothing touches the
/// caller's memory any more.
///
/// Threads of the pool open a file when its turn comes, a bounded number at a time, and close it when its bytes have
/// been moved, because both may block in the file system. If little of a file is wanted and all of it is cached, the
/// thread that opens the file reads it, too, and the driver sees no chunk of it.
///
/// The driver itself plans and ends a small load of a file that another load has open, if it can see without waiting
/// that the file is the same. Threads that wake each other would cost more than the load.
///
/// A file system that does not answer delays only the transfers of its own files. Jobs limits the operations and slots
/// that it may have meanwhile, and OpenParts the open files.
///
/// Thread safety: one thread, the driver, except for inbox().
class Transfers final : public Steps::Owner {
 public:
  using Time = std::chrono::steady_clock::time_point;

  /// Borrows all that it is given references and pointers to. `steps` is constructed after this, and has this as its
  /// owner. `copier` is null for an engine of the host. `tracer` is told of each file that is opened or closed, and of
  /// the end of each transfer.
  Transfers(Steps& steps, Schedule& schedule, DiskQueue& disk, Pool& pool, Copier* copier, OpenRules rules,
            Tracer tracer);

  /// Where any thread hands prepared transfers to the driver.
  Inbox& inbox() const noexcept { return files_.inbox(); }

  /// Does all that has come up since the last turn: begins transfers, ends those that are through, cancelled or late,
  /// and has the next files opened.
  void take_turn(Time now);
  /// If all have ended and no other will come, ends the inbox. Returns whether it has. Threads that are late in opening
  /// or closing files are left behind.
  bool end_if_finished();
  /// How long the next turn may wait if nobody wakes the driver; empty is for ever.
  std::optional<std::chrono::nanoseconds> patience() const;

 private:
  // Transfers.
  void take_messages();
  void admit(const std::shared_ptr<TransferState>& started);
  void expire();
  void look_at_gates();
  void give_up(TransferState& transfer, std::error_code code);
  void give_up(TransferState& transfer, const Error& error);
  void end_if_idle(TransferState& transfer);
  void end(TransferState& transfer);
  void tell_of_end(const TransferState& transfer, const std::optional<Failure>& failure) const;

  // Parts, in the order of their lives.
  void admit(Part& part);
  void open(Part& part);
  void on_answer(Inbox::Answer& answer);
  void on_opened(Part& part, Opened opened);
  void begin_issuing(Part& part);
  void on_delivered(Part& part, const Chunk& chunk) override;
  void on_given_back(Part& part) override { schedule_.add(part); }
  void on_failed(Part& part, const Error& error) override { fail(part, error); }
  void on_came_back(Part& part) override;
  void on_all_back(Part& part);
  bool may_leave_open(const Part& part) const;
  void close(Part& part);
  void leave(Part& part);
  void fail(Part& part, const Error& error);
  void give_up(Part& part);
  void look_for_late();
  void stop_waiting_for_late_threads();
  void stop_waiting_for(Part& part, bool late = false);
  bool let_go(Part& part, bool late);

  Steps& steps_;
  Schedule& schedule_;
  DiskQueue& disk_;
  Pool& pool_;
  Copier* const copier_;
  const OpenRules rules_;
  const Tracer tracer_;
  const ProfilerRanges ranges_;
  FileTasks files_;
  OpenParts parts_;
  GatedTransfers gated_;
  Time now_;  // The time at the start of this turn.
  Time looked_for_late_;

  std::size_t unfinished_ = 0;  // Transfers that have not ended.
  std::uint64_t next_turn_ = 0;
  std::uint64_t next_number_ = 1;  // For the next transfer.
  std::set<std::pair<Deadline, TransferState*>> deadlines_;
  Inbox::Messages messages_;  // Used in take_messages() only.
};

}  // namespace flashpack::internal
