/// The results that the driver and the thread that opens or closes a file hand to each other.
#pragma once

#include <atomic>
#include <cassert>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "engine/failure.h"

namespace flashpack::internal {

/// How the work on a part has ended.
struct PartResult {
  std::optional<Failure> failure;
  std::uint64_t verified_bytes = 0;
  std::uint64_t read_bytes = 0;  // Bytes that open_part() has read: none or all.
  std::string fallback_reason = {};
};

/// The driver and the thread that opens or closes the file of a part share this while the thread works, and nothing
/// else that changes. Thread safety: as each function says.
class Handover {
 public:
  /// Claims the caller's memory for the calling side, the thread or the driver. False if the other side has it. The
  /// thread claims it for as long as it reads into it, and the driver claims it when the part fails. Whichever comes
  /// first decides: the transfer waits until the thread has read, or ends at once and the thread reads nothing.
  bool claim_memory() noexcept { return !memory_claimed_.exchange(true); }
  /// The thread, when it has read.
  void release_memory() noexcept { memory_claimed_ = false; }

  /// Gives the result, once: the thread, when it has nothing left to do but to close the file, or the driver, when no
  /// thread has the part, or whoever prepares the transfer, before the driver has it.
  void end(PartResult result) noexcept {
    assert(!ended_);
    result_ = std::move(result);
    ended_ = true;
  }
  /// The driver: null until end().
  const PartResult* result() const noexcept { return ended_ ? &result_ : nullptr; }

 private:
  std::atomic<bool> memory_claimed_ = false;
  std::atomic<bool> ended_ = false;  // Set after result_, which is constant from then on.
  PartResult result_;
};

}  // namespace flashpack::internal
