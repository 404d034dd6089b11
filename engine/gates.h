/// Transfers that wait for the caller's own work on a device.
#pragma once

#include <chrono>
#include <functional>
#include <optional>
#include <system_error>
#include <vector>

#include "engine/transfer_state.h"

namespace flashpack::internal {

/// The transfers with a shut gate, and the time until the next look at their gates. The device tells nobody that a gate
/// has opened, so that the driver has to look.
///
/// Thread safety: one thread, the driver.
class GatedTransfers {
 public:
  using Time = std::chrono::steady_clock::time_point;

  /// Borrows the transfer if it has gates, until they have opened or remove().
  void add(TransferState& transfer, Time now);
  /// Has no effect if the transfer is not here.
  void remove(TransferState& transfer);
  /// Looks at all gates, and takes away those that have opened. A transfer that has none left, or that has failed, is
  /// not here any more then. Nor is one whose device has failed, for which this calls `failed`, which may call
  /// remove().
  void look(Time now, const std::function<void(TransferState&, std::error_code)>& failed);
  /// How long the next look may wait; empty if there is nothing to look at.
  std::optional<std::chrono::nanoseconds> patience(Time now) const;

 private:
  std::vector<TransferState*> transfers_;
  Time changed_;  // When a transfer was last added or removed.
};

}  // namespace flashpack::internal
