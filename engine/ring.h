/// io_uring as a DiskQueue: direct I/O between files and slots, targets, sources.
#pragma once

#include <liburing.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/io_queue.h"
#include "engine/unique_fd.h"

namespace flashpack::internal {

/// Made, used and destroyed by one thread; wake() from any.
///
/// A child that is forked while this lives does not inherit the ring, where the kernel can keep it out of the table of
/// descriptors (Linux 6.3), and with it the registered slots, which would stay in memory as long as the child. On older
/// kernels they are given back when this is destroyed, but not where the process is killed before its child.
class Ring final : public DiskQueue {
 public:
  /// Ways to set up a ring, best first. What each lacks costs CPU, not speed.
  enum class Rung : std::uint8_t {
    kDeferred,     ///< SINGLE_ISSUER and DEFER_TASKRUN: completions never interrupt the driver. Linux 6.1.
    kCooperative,  ///< COOP_TASKRUN. Linux 5.19.
    kBare,         ///< No flags.
  };

  /// Takes the best rung from `best` on that the kernel knows. At most `in_flight_limit` operations at a time; `slots`
  /// are the staging slots to register with it, none to do without. Throws: std::system_error, with the cause in its
  /// text, where io_uring is refused.
  Ring(unsigned in_flight_limit, std::vector<std::span<std::byte>> slots, Rung best = Rung::kDeferred);
  /// Requires: nothing in flight.
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

  void hide();
  io_uring_sqe* next_sqe();
  void arm_wake();
  void prepare(io_uring_sqe* sqe, const DiskRequest& request, bool fixed);
  bool registered(int slot, std::size_t used_bytes);
  int enter(std::optional<std::chrono::nanoseconds> timeout);
  void reap();
  void complete(unsigned tag, std::int64_t result);
  bool is_final(int error_number);
  void leave(int error_number);
  void wait_without_ring(std::optional<std::chrono::nanoseconds> timeout);

  Rung rung_;
  std::unique_ptr<io_uring> storage_;
  std::unique_ptr<io_uring, RingDeleter>
      ring_;  // Of storage_, once it is set up; null again when the kernel has refused it.
  UniqueFd wake_fd_;
  std::unique_ptr<std::uint64_t> wake_value_;  // The kernel writes here while the wake read is armed.
  std::atomic<bool> wake_pending_ = false;
  std::vector<std::span<std::byte>> slots_;
  std::vector<std::uint8_t> slot_uses_;  // Of most of it, saturating; a slot is registered when it is used so again.
  bool table_ = false;                   // The kernel has a table of buffers for us.
  bool table_refused_ = false;
  UniqueFd let_go_;                                        // At its end when the kernel has let go of the ring.
  std::vector<bool> in_flight_;                            // By tag.
  std::chrono::steady_clock::time_point refused_since_{};  // Without success since then; the epoch: not refused.
  std::string fallback_reason_;
  std::vector<IoCompletion> completions_;
};

}  // namespace flashpack::internal
