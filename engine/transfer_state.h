/// What a Transfer handle and the driver thread share.
#pragma once

#include <sys/types.h>

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

#include "engine/copier.h"
#include "engine/part.h"
#include "flashpack/engine.h"

namespace flashpack::internal {

/// How to reach the driver from any thread; it outlives every unfinished transfer.
class Driver {
 public:
  /// The transfer was cancelled.
  virtual void attend(std::shared_ptr<TransferState> transfer) noexcept = 0;

 protected:
  ~Driver() = default;
};

struct TransferState : std::enable_shared_from_this<TransferState> {
  static Transfer handle(std::shared_ptr<TransferState> state) { return Transfer(std::move(state)); }

  /// The driver, at the end: makes the result known to itself, calls the completion, then wakes everybody who waits. In
  /// this order a Completion may be destroyed as soon as wait() has returned.
  void finish(std::optional<Failure> result);
  /// Whether the calling thread may see the result. Requires: `mutex` is held.
  bool visible() const { return published || (ended && std::this_thread::get_id() == ended_by); }
  static void cancel(const std::shared_ptr<TransferState>& state) noexcept;
  /// The driver, or whoever prepares the transfer: adds to stats.fallback_reason what is not in it yet.
  void note_fallback(const std::string& reason);
  /// Throws Errc::kUnusable in a forked child, where the driver thread does not exist.
  void require_owner() const;

  bool is_load() const noexcept { return direction == Direction::kLoad; }
  const char* verb() const noexcept { return is_load() ? "read" : "write"; }
  /// Stands for all files in messages that are of none.
  std::filesystem::path path() const { return parts.empty() ? std::filesystem::path() : parts.front().path; }

  // Constant once started.
  enum class Direction : std::uint8_t { kLoad, kStore };
  Direction direction = Direction::kLoad;
  std::optional<Deadline> deadline;
  Completion* completion = nullptr;
  AfterLoad after = AfterLoad::kKeep;
  std::chrono::steady_clock::time_point started = std::chrono::steady_clock::now();
  pid_t owner = 0;

  // The driver's alone, once started.
  std::deque<Part> parts;                         // One, already open, of a store. They stay where they are.
  std::shared_ptr<TransferState> self;            // Until the end, so that it outlives its handle.
  std::shared_ptr<TransferState> next_cancelled;  // Of those that the driver is to look at; protected by its mutex.
  std::unique_ptr<Gate> gate;                     // Until it opens, nothing is copied to or from a device. Null: open.
  std::size_t parts_awaited = 0;                  // Parts that are not done and that the end waits for.
  std::uint32_t jobs = 0;                         // Chunks under way.
  std::optional<Failure> failure;  // May be there from the start; then there is nothing to do but to say so.

  // Any thread; the counters are written by the driver alone.
  std::atomic<bool> cancel_requested = false;
  std::atomic<std::uint64_t> done_bytes = 0;
  std::atomic<std::uint32_t> outstanding = 0;  // Chunks under way, and files that are opened or closed.
  std::uint64_t total_bytes = 0;               // Constant once started.

  // Written by the driver until the end, then constant.
  TransferStats stats;

  // Protected by mutex.
  mutable std::mutex mutex;
  std::condition_variable published_changed;
  bool ended = false;      // `outcome` and `stats` are final.
  bool published = false;  // And the completion has returned.
  std::thread::id ended_by;
  std::optional<Failure> outcome;
  Driver* driver = nullptr;  // Null before the start and after the end.
};

}  // namespace flashpack::internal
