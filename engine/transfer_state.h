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
  bool visible() const;
  void wait() const;
  /// Waits for at most `duration`. Returns visible().
  bool wait_for(std::chrono::nanoseconds duration) const;
  /// Null if the transfer has not ended, or has ended without a failure. Stays valid.
  const Failure* failure() const;
  /// Empty if the transfer has not ended.
  TransferStats stats() const;

 private:
  bool is_visible() const;

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
/// add(), the report functions and finish() act, in this order; the other functions ask. They are for the thread that
/// may use `driver`, except those that say "any thread".
struct TransferState : std::enable_shared_from_this<TransferState> {
  /// The thread that prepares the transfer has it until the start. From then on only the driver uses it, until the end.
  /// After it, a FileWriter asks for sums().
  struct Driver {
    std::deque<Part> parts;                    // A store has one part, already open. Parts never move in memory.
    std::uint64_t number = 0;                  // Counted from 1 in the order in which the driver got them.
    std::uint64_t range = 0;                   // As ProfilerRanges has numbered it.
    std::shared_ptr<TransferState> self;       // Shared with the handle until the end, because it may be gone earlier.
    std::vector<std::unique_ptr<Gate>> gates;  // While any is shut, nothing is copied to or from a device.
    std::size_t parts_awaited = 0;             // Parts that the end still waits for.
    std::optional<Failure> failure;            // The error that ended the whole transfer, if one did.
    TransferStats stats;

    /// Adds `reason` to stats.fallback_reason unless it is there.
    void note_fallback(const std::string& reason);
    /// The path for messages that concern no single file.
    std::filesystem::path path() const { return parts.empty() ? std::filesystem::path() : parts.front().request.path; }
  };

  explicit TransferState(TransferRequest wanted = {}) : request(wanted) {}

  /// Any thread.
  static Transfer handle(std::shared_ptr<TransferState> state) { return Transfer(std::move(state)); }

  /// Takes over the result of a part.
  void add(const PartResult& result);
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

  // Protects `inbox` from the start on, and keeps it alive for a call. Inbox::start() sets `inbox` without it, because
  // no thread has a handle of the transfer yet.
  std::mutex inbox_mutex;
  Inbox* inbox = nullptr;  // The driver's; null before the start and after the end.
};

}  // namespace flashpack::internal
