/// The events of the C API: an EventQueue that knows how the caller counts his extents.
///
/// Thread safety: any thread may call any member, but destruction needs the object to itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "flashpack/detail/owner_process.h"
#include "flashpack/event_queue.h"
#include "flashpack/flashpack.h"

namespace flashpack::c {

/// For each extent of each file of a LoadRequest, its index in the request of the caller.
using ExtentIndices = std::vector<std::vector<std::size_t>>;

}  // namespace flashpack::c

struct flashpack_events {
 public:
  /// In a forked child of this process, nothing of the object may be used or destroyed.
  const flashpack::detail::OwnerProcess& owner() const noexcept { return owner_; }

  /// Starts a transfer with `start_transfer(queue, number)`, which gets a number of this object's own for the caller's
  /// `tag`. Throws: what that throws.
  template <typename Start>
  flashpack::Transfer start(std::uint64_t tag, flashpack::c::ExtentIndices indices, Start start_transfer) {
    owner_.require_current("events");
    const std::uint64_t number = add({tag, std::move(indices)});
    try {
      return start_transfer(queue_, number);
    } catch (...) {
      remove(number);
      throw;
    }
  }

  int fd() const noexcept { return queue_.fd(); }
  /// Fills `taken` with the oldest events, and returns their number.
  std::size_t take(flashpack_event* taken, std::size_t capacity);

 private:
  struct Started {
    std::uint64_t tag;
    flashpack::c::ExtentIndices indices;
  };

  std::uint64_t add(Started started);
  void remove(std::uint64_t number);

  const flashpack::detail::OwnerProcess owner_;
  flashpack::EventQueue queue_;
  std::mutex mutex_;  // Protects the rest, and keeps the events of a transfer in order while they are taken.
  std::unordered_map<std::uint64_t, Started> started_;  // By number; until its last event is taken.
  std::uint64_t next_ = 0;
};
