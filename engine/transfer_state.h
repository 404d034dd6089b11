/// What a Transfer handle and the driver thread share.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "engine/copier.h"
#include "engine/plan.h"
#include "engine/router.h"
#include "flashpack/engine.h"

namespace flashpack::engine {

/// The parts of an Error, from which each wait() makes its own: exceptions share their text between copies, and copies
/// of one error may be looked at and dropped by several threads.
struct Failure {
  explicit Failure(const Error& error);
  Error error() const { return Error(code, context, path, offset_bytes); }

  std::error_code code;
  std::string context;
  std::filesystem::path path;
  std::uint64_t offset_bytes;
};

/// How to reach the driver from any thread; it outlives every unfinished transfer.
class Driver {
 public:
  /// Some transfer wants to be looked at: it was cancelled.
  virtual void attend() noexcept = 0;

 protected:
  ~Driver() = default;
};

struct TransferState {
  static Transfer handle(std::shared_ptr<TransferState> state) { return Transfer(std::move(state)); }

  /// The driver, at the end: makes the result known to itself, calls the completion, then wakes everybody who waits. In
  /// this order a Completion may be destroyed as soon as wait() has returned.
  void finish(std::optional<Failure> result, std::shared_ptr<TransferState> self);
  /// Whether the calling thread may see the result. Requires: `mutex` is held.
  bool visible() const { return published || (ended && std::this_thread::get_id() == ended_by); }
  void cancel() noexcept;
  /// The driver, or whoever prepares the transfer: adds to stats.fallback_reason what is not in it yet.
  void note_fallback(const std::string& reason);
  /// Throws Errc::kUnusable in a forked child, where the driver thread does not exist.
  void require_owner() const;

  bool is_load() const noexcept { return !store; }
  const char* verb() const noexcept { return is_load() ? "read" : "write"; }
  const std::filesystem::path& path_of(std::uint32_t file) const noexcept {
    return is_load() ? sources[file].file.path() : store_path;
  }
  const File& file(std::uint32_t index) const noexcept { return is_load() ? sources[index].file : *store; }
  /// Where the bytes of a file are counted; null where they are not.
  PieceSums* sums(std::uint32_t file) noexcept {
    std::optional<PieceSums>& sums = is_load() ? sources[file].sums : store_sums;
    return sums ? &*sums : nullptr;
  }
  /// Whether direct I/O on a file has not been refused.
  bool& direct(std::uint32_t index) noexcept { return is_load() ? sources[index].direct : store_direct; }

  // Constant once started.
  std::optional<Deadline> deadline;
  Completion* completion = nullptr;
  std::vector<Source> sources;  // Loads; residency and direct are the driver's.
  AfterLoad after = AfterLoad::kKeep;
  const File* store = nullptr;          // Stores: borrowed from the FileWriter.
  std::filesystem::path store_path;     // Stores: for messages.
  std::optional<PieceSums> store_sums;  // Stores.
  Plan plan;
  std::chrono::steady_clock::time_point started = std::chrono::steady_clock::now();
  pid_t owner = 0;

  // The driver's alone.
  bool store_direct = false;
  Router router;
  std::unique_ptr<Gate> gate;      // Until it opens, nothing is copied to or from a device. Null: open.
  std::uint32_t chunks_open = 0;   // Neither delivered nor given up.
  std::optional<Failure> failure;  // May be there from the start; then there is nothing to do but to say so.

  // Any thread; the counters are written by the driver alone.
  std::atomic<bool> cancel_requested = false;
  std::atomic<std::uint64_t> done_bytes = 0;
  std::atomic<std::uint32_t> outstanding = 0;  // Jobs under way.

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

}  // namespace flashpack::engine
