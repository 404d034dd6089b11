/// A DiskQueue that uses io_uring.
#pragma once

#include <liburing.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/ground/unique_fd.h"
#include "engine/io_queue.h"

namespace flashpack::internal {

/// Thread safety: one thread makes and uses it. When it refuses(), one other thread goes on with it, and destroys it.
/// Any thread may call wake().
///
/// Since Linux 6.3 the ring has no descriptor, so that a forked child does not inherit it. A child that inherits the
/// ring keeps the registered slots in memory as long as it lives. On older kernels the destructor unregisters the
/// slots, but a process that is killed before its child cannot.
class Ring final : public DiskQueue {
 public:
  /// Setups of a ring, best first: later ones interrupt the driver more often. How much that costs is not measured.
  enum class Rung : std::uint8_t {
    kDeferred,     ///< SINGLE_ISSUER and DEFER_TASKRUN: completions never interrupt the driver. Linux 6.1.
    kCooperative,  ///< COOP_TASKRUN. Linux 5.19.
    kBare,         ///< No flags.
  };

  /// Takes the best rung, from `best` on, that the kernel knows. At most `in_flight_limit` operations may be in flight,
  /// which is at most kMostTags.
  /// `slots` are the staging slots to register; if empty, none are. Throws: std::system_error, with the cause in its
  /// text, if io_uring is refused.
  Ring(unsigned in_flight_limit, std::vector<std::span<std::byte>> slots, Rung best = Rung::kDeferred);
  /// Requires: nothing is in flight.
  ~Ring() override;

  void push(unsigned tag, const DiskRequest& request) override;
  void cancel(unsigned tag) override;
  std::span<const IoCompletion> wait(std::optional<std::chrono::nanoseconds> timeout) override;
  void wake() noexcept override;
  bool refuses() const noexcept override { return !ring_; }
  std::string fallback_reason() const override { return fallback_reason_; }
  Rung rung() const noexcept { return rung_; }

 private:
  struct RingDeleter {
    void operator()(io_uring* ring) const noexcept;
  };

  void set_up(unsigned entries);
  void hide();
  io_uring_sqe* next_sqe();
  void arm_wake();
  void prepare(io_uring_sqe* sqe, const DiskRequest& request, bool fixed);
  bool register_if_used_again(int slot, std::size_t used_bytes);
  int enter(std::optional<std::chrono::nanoseconds> timeout);
  void reap();
  void complete(unsigned tag, std::int64_t result);
  bool note_if_refused(int error_number);
  void leave(int error_number, const char* call);
  void wait_without_ring(std::optional<std::chrono::nanoseconds> timeout);

  Rung rung_;
  // The kernel writes here while the wake read is armed. ring_ is declared later, so that it is closed before this is
  // freed, also when the constructor throws.
  std::unique_ptr<std::uint64_t> wake_value_;
  std::unique_ptr<io_uring> storage_;
  std::unique_ptr<io_uring, RingDeleter> ring_;  // Points to storage_ while the ring is set up, else null.
  UniqueFd wake_fd_;
  std::atomic<bool> wake_pending_ = false;
  unsigned failed_wakes_ = 0;  // Wake reads in a row that have failed.
  int wake_error_ = 0;         // The errno of the last one.
  bool wake_is_lost_ = false;  // Without a ring: wake() reaches nobody, so that wait() looks now and then.
  std::vector<std::span<std::byte>> slots_;
  std::vector<std::uint8_t>
      slot_uses_;       // For each slot, how often at least half of it was used; counted until it is registered.
  bool table_ = false;  // Whether the kernel has a table of this ring's buffers.
  bool table_refused_ = false;
  UniqueFd let_go_;                                        // A pipe that ends when the kernel has released the ring.
  std::vector<bool> in_flight_;                            // Whether an operation with that tag is in flight.
  std::chrono::steady_clock::time_point refused_since_{};  // No success since then; the epoch if not refused.
  std::string fallback_reason_;
  std::vector<IoCompletion> completions_;
};

}  // namespace flashpack::internal
