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
/// completion has returned, so that a Completion may be destroyed as soon as wait() has returned, or after it has
/// called TransferState::publish_end(). reach(), publish() and the waits act; the other functions ask.
///
/// Thread safety: any thread; only the driver calls reach(), once, and publish().
class TransferEnd {
 public:
  /// The transfer has ended: nothing of it is under way any more.
  void reach(std::optional<Failure> failure, TransferStats stats);
  /// Wakes the threads that wait. More than one call does no harm.
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

/// The state for the one thread that has a transfer: the thread that prepares it, until the start, and from then on
/// the driver, until the end. After it, a FileWriter asks for sums().
struct DriverState {
  std::deque<Part> parts;                    // A store has one part, already open. Parts never move in memory.
  std::uint64_t number = 0;                  // From 1 on, in the order in which the driver got the transfers.
  std::uint64_t range = 0;                   // As ProfilerRanges has numbered it.
  std::shared_ptr<TransferState> self;       // Shared with the handle until the end, because it may be gone earlier.
  std::vector<std::unique_ptr<Gate>> gates;  // Those that were shut when last looked at.
  std::size_t parts_awaited = 0;             // Parts that the end still waits for.
  std::uint32_t stuck_copies = 0;            // Jobs that are stuck in the caller's memory. Only Jobs changes it.
  std::optional<Failure> failure;            // The error that ended the whole transfer, if one did.
  TransferStats stats;                       // The work so far.

  /// Whether the caller's work on a device has not ended, as far as is known. Until it has, nothing is copied to or
  /// from a device.
  bool has_shut_gate() const noexcept { return !gates.empty(); }
  /// Adds `reason` to TransferStats::fallback_reason unless it is there.
  void note_fallback(std::string_view reason);
  /// The path for messages that concern no single file: that of the first file; empty if there is none.
  std::filesystem::path path() const;
  /// The result of a load of one file whose bytes have been read while it was prepared; null for all others.
  const PartResult* result_if_read() const;
  /// The sums of what a store has written; null if nothing is counted.
  const StripeSums* sums() const;
};

/// Shared by the caller's handle, the driver, threads that open or close a file of the transfer, and the FileWriter
/// that started it, because any of them may be the last to need it.
///
/// Thread safety: any thread, except for `driver` and the functions that say so.
struct TransferState : std::enable_shared_from_this<TransferState> {
  explicit TransferState(TransferRequest wanted = {}) : request(wanted) {}

  static Transfer handle(std::shared_ptr<TransferState> state) { return Transfer(std::move(state)); }
  /// Shows the end to other threads before done() has returned. Only a completion calls it, within done(), that none of
  /// them can destroy before that.
  static void publish_end(const Transfer& ended) { ended.state_->end.publish(); }
  bool is_load() const noexcept { return request.direction == Direction::kLoad; }
  const char* verb() const noexcept { return is_load() ? "read" : "write"; }

  /// The thread that may use `driver`: takes over the result of a part.
  void add(const PartResult& result);
  /// The same thread: ends the transfer, and calls the completion.
  void finish(std::optional<Failure> result);

  /// Borrows the driver's inbox until finish(). Requires: no other thread has the transfer yet.
  void set_inbox(Inbox& inbox) noexcept { inbox_ = &inbox; }
  /// Calls `use` with the driver's inbox, which lives that long, or not at all before the start and after the end.
  template <class Use>
  void with_inbox(Use use) {
    const std::lock_guard lock(inbox_mutex_);
    if (inbox_) use(*inbox_);
  }

  const TransferRequest request;
  const std::chrono::steady_clock::time_point started = std::chrono::steady_clock::now();
  const detail::OwnerProcess owner;

  DriverState driver;

  std::atomic<bool> cancel_requested = false;
  // Only the driver writes these two.
  std::atomic<std::uint64_t> done_bytes = 0;
  std::atomic<std::uint32_t> outstanding = 0;  // Chunks under way, and files that are opened or closed.
  TransferEnd end;

  // The next in the inbox's list of cancelled transfers, shared as Inbox::Messages::cancelled. Protected by the inbox's
  // mutex, until the driver has the list.
  std::shared_ptr<TransferState> next_cancelled;

 private:
  std::mutex inbox_mutex_;
  Inbox* inbox_ = nullptr;  // Protected by the mutex from the start of the transfer on.
};

}  // namespace flashpack::internal
