/// The state that a Transfer handle and the driver thread share.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#include "engine/copier.h"
#include "engine/failure.h"
#include "engine/part.h"
#include "engine/way.h"
#include "flashpack/detail/owner_process.h"
#include "flashpack/engine.h"

namespace flashpack::internal {

class Inbox;

/// How a transfer ended. The driver sees the end first and calls the completion. Other threads see it after the
/// completion has returned, so that a Completion may be destroyed as soon as wait() has returned. reach(),
/// publish() and the waits act; the other functions ask.
///
/// Thread safety: any thread; only the driver calls reach() and publish(), each once.
class TransferEnd {
 public:
  /// The transfer has ended: nothing of it is under way any more.
  void reach(std::optional<Failure> failure, TransferStats stats);
  /// Wakes the threads that wait.
  void publish();

  /// Whether reach() has been called.
  bool reached() const;
  /// Whether the calling thread may see the result.
  bool is_visible() const;
  void wait() const;
  /// Waits for at most `duration`. Returns is_visible().
  bool wait_for(std::chrono::nanoseconds duration) const;
  /// Null if the transfer has not ended, or has ended without a failure. Stays valid.
  const Failure* failure() const;
  /// Empty if the transfer has not ended.
  TransferStats stats() const;

 private:
  using Lock = std::unique_lock<std::mutex>;
  bool is_visible(const Lock& lock) const;

  mutable std::mutex mutex_;  // Protects the rest.
  mutable std::condition_variable published_changed_;
  bool reached_ = false;
  bool published_ = false;
  std::thread::id reached_by_;
  std::optional<Failure> failure_;  // Constant once `reached_`.
  TransferStats stats_;
};

/// The wishes of the caller for all files of a transfer.
struct TransferRequest {
  Direction direction = Direction::kLoad;
  std::optional<Deadline> deadline;
  Completion* completion = nullptr;
  AfterLoad after = AfterLoad::kKeep;
  bool continue_on_error = false;
  std::uint64_t total_bytes = 0;      // Size of all extents.
  PagePolicy* page_policy = nullptr;  // The engine's.
};

/// Shared by the caller's handle, the driver, threads that open or close a file of the transfer, and the FileWriter
/// that started it, because any of them may be the last to need it.
///
/// look_at_gates(), the count and note functions, add(), the report functions, finish(), set_inbox() and with_inbox()
/// act; the other functions ask. They are for the thread that may use `driver`, except those that say "any thread".
/// Only those who make transfers, begin them and end them use `driver` itself; all others use these functions.
struct TransferState : std::enable_shared_from_this<TransferState> {
  /// The thread that prepares the transfer has it until the start. From then on only the driver uses it, until the end.
  /// After it, a FileWriter asks for sums().
  struct Driver {
    std::deque<Part> parts;                    // A store has one part, already open. Parts never move in memory.
    std::uint64_t number = 0;                  // See number().
    std::uint64_t range = 0;                   // As ProfilerRanges has numbered it.
    std::shared_ptr<TransferState> self;       // Shared with the handle until the end, because it may be gone earlier.
    std::vector<std::unique_ptr<Gate>> gates;  // Those that were shut when last looked at. See has_shut_gate().
    std::size_t parts_awaited = 0;             // Parts that the end still waits for.
    std::optional<Failure> failure;            // The error that ended the whole transfer, if one did.
    TransferStats stats;
  };

  explicit TransferState(TransferRequest wanted = {}) : request(wanted) {}

  /// Any thread.
  static Transfer handle(std::shared_ptr<TransferState> state) { return Transfer(std::move(state)); }

  /// Looks once, without waiting, whether the caller's work on each device has ended. Sets `error` if a device has
  /// failed.
  void look_at_gates(std::error_code& error);
  /// Whether that work has not ended, as far as look_at_gates() knows. Until it has, nothing is copied to or from a
  /// device.
  bool has_shut_gate() const noexcept { return !driver.gates.empty(); }

  /// These count in TransferStats what has been done for the transfer.
  void count_operation() noexcept { ++driver.stats.operations; }
  void count_retry() noexcept { ++driver.stats.retries; }
  void count_direct(std::uint64_t bytes) noexcept { driver.stats.direct_bytes += bytes; }
  void count_buffered(std::uint64_t bytes) noexcept { driver.stats.buffered_bytes += bytes; }
  void count_staged(std::uint64_t bytes) noexcept { driver.stats.staged_bytes += bytes; }
  /// Adds `reason` to TransferStats::fallback_reason unless it is there.
  void note_fallback(std::string_view reason);
  /// Counted from 1 in the order in which the driver got the transfers; 0 before it has this one.
  std::uint64_t number() const noexcept { return driver.number; }

  /// The path for messages that concern no single file: that of the first file; empty if there is none.
  std::filesystem::path path() const;

  /// Takes over the result of a part.
  void add(const PartResult& result);
  /// Whether an error has ended the whole transfer.
  bool has_failed() const noexcept { return driver.failure.has_value(); }
  /// How the transfer has failed, also if only some of its parts have. Requires: all parts have ended.
  std::optional<Failure> failure() const;
  /// Tells the completion of the extents that wait for no chunk: those of no bytes, or all, if the thread that opened
  /// the file has read it.
  void report_at_once(const Part& part) const;
  /// Tells the completion, if it wants to know, of the part's extents that have landed with `chunk`, which has been
  /// delivered. Throws: Error, kCorrupt, if a stripe of them does not match.
  void report_landed(Part& part, const Chunk& chunk) const;
  /// Ends the transfer, and calls the completion.
  void finish(std::optional<Failure> result);

  /// The result of a load of one file whose bytes have been read while it was prepared; null for all others.
  const PartResult* result_if_read() const;
  /// The sums of what a store has written; null if nothing is counted. The FileWriter asks, after the end.
  const StripeSums* sums() const;
  /// Any thread.
  bool is_load() const noexcept { return request.direction == Direction::kLoad; }
  /// Any thread.
  const char* verb() const noexcept { return is_load() ? "read" : "write"; }

  const TransferRequest request;
  const std::chrono::steady_clock::time_point started = std::chrono::steady_clock::now();
  const detail::OwnerProcess owner;

  Driver driver;

  // Any thread; only the driver writes the counters.
  std::atomic<bool> cancel_requested = false;
  std::atomic<std::uint64_t> done_bytes = 0;
  std::atomic<std::uint32_t> outstanding = 0;  // Chunks under way, and files that are opened or closed.
  TransferEnd end;

  // The next in the inbox's list of cancelled transfers, shared as Inbox::Messages::cancelled. Protected by the inbox's
  // mutex, until the driver has the list.
  std::shared_ptr<TransferState> next_cancelled;

  /// Borrows the driver's inbox until finish(). Requires: no other thread has the transfer yet.
  void set_inbox(Inbox& inbox) noexcept { inbox_ = &inbox; }
  /// Any thread: calls `use` with the driver's inbox, which lives that long, or not at all before the start and after
  /// the end.
  template <class Use>
  void with_inbox(Use use) {
    const std::lock_guard lock(inbox_mutex_);
    if (inbox_) use(*inbox_);
  }

 private:
  std::mutex inbox_mutex_;
  Inbox* inbox_ = nullptr;  // Protected by the mutex from the start of the transfer on.
};

}  // namespace flashpack::internal
