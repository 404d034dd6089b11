/// Waits for transfers that Python has started, and cancels them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>

#include "flashpack/transfer.h"
#include "native_calls.h"

namespace flashpack {

/// Called on the waiting thread with the number of bytes that are done.
using ProgressFunction = std::optional<nanobind::typed<nanobind::callable, nanobind::object(std::uint64_t)>>;

/// The longest time until Ctrl-C is noticed.
inline constexpr auto kSignalPeriod = std::chrono::milliseconds(50);

/// Nothing is in flight when this returns, so the caller's memory may go.
inline void cancel_and_drain(std::span<Transfer* const> transfers) {
  const ReleasedUnlessEnded released;
  for (Transfer* transfer : transfers) transfer->cancel();
  for (Transfer* transfer : transfers) {
    while (!transfer->wait_for(kSignalPeriod)) {
    }
  }
}

inline std::uint64_t done_bytes(std::span<Transfer* const> transfers) {
  std::uint64_t sum = 0;
  for (const Transfer* transfer : transfers) sum += transfer->progress().done_bytes;
  return sum;
}

/// Waits for a while. True if all have finished. Throws: the Error of one that has failed.
inline bool wait_a_while(std::span<Transfer* const> transfers) {
  const bool finished = std::ranges::all_of(transfers, [](Transfer* each) { return each->wait_for(kSignalPeriod); });
  for (Transfer* transfer : transfers) {
    if (transfer->wait_for({}) && transfer->error()) transfer->wait();
  }
  return finished;
}

/// Waits with the GIL released. If the handler of a signal raises, `progress` raises, or a transfer fails, all
/// transfers are cancelled. `progress` is called with `base_bytes` plus the bytes that the transfers have done.
inline void wait_for_all(std::span<Transfer* const> transfers, const ProgressFunction& progress,
                         std::uint64_t base_bytes = 0) {
  try {
    for (bool finished = false; !finished;) {
      if (progress) (*progress)(base_bytes + done_bytes(transfers));
      if (PyErr_CheckSignals() != 0) throw nanobind::python_error();
      leave_if_ended();
      nanobind::gil_scoped_release released;
      finished = wait_a_while(transfers);
    }
  } catch (...) {
    cancel_and_drain(transfers);
    throw;
  }
  if (progress) (*progress)(base_bytes + done_bytes(transfers));
}

/// A transfer that has been started, and the Python object that must live until it ends.
struct UnderWay {
  UnderWay(nanobind::object owner, Transfer started) : memory(std::move(owner)), transfer(std::move(started)) {}
  UnderWay(UnderWay&&) = default;
  UnderWay& operator=(UnderWay&&) = delete;
  ~UnderWay() {
    const ReleasedUnlessEnded released;
    transfer = {};
  }

  nanobind::object memory;
  Transfer transfer;
};

}  // namespace flashpack
