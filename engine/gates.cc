#include "engine/gates.h"

#include <algorithm>

namespace flashpack::internal {

namespace {

// A gate waits for the caller's own work, which may take long. The next look at the gate comes after an eighth of the
// wait so far, but after at least kShortestPeriod and at most kLongestPeriod. These are bounds and not tuned.
constexpr int kLooksPerWait = 8;
constexpr std::chrono::microseconds kShortestPeriod{100};
constexpr std::chrono::milliseconds kLongestPeriod{4};

}  // namespace

void GatedTransfers::add(TransferState& transfer, Time now) {
  if (!transfer.driver.has_shut_gate()) return;
  transfers_.push_back(&transfer);
  changed_ = now;
}

void GatedTransfers::remove(TransferState& transfer) { std::erase(transfers_, &transfer); }

void GatedTransfers::look(Time now, const std::function<void(TransferState&, std::error_code)>& failed) {
  for (std::size_t i = transfers_.size(); i-- > 0;) {
    TransferState& transfer = *transfers_[i];
    std::error_code error;
    DriverState& driver = transfer.driver;
    if (!driver.failure) std::erase_if(driver.gates, [&](const auto& gate) { return gate->is_open(error); });
    if (driver.has_shut_gate() && !driver.failure && !error) continue;
    changed_ = now;
    transfers_.erase(transfers_.begin() + static_cast<std::ptrdiff_t>(i));
    if (error) failed(transfer, error);
  }
}

std::optional<std::chrono::nanoseconds> GatedTransfers::patience(Time now) const {
  if (transfers_.empty()) return std::nullopt;
  return std::clamp<std::chrono::nanoseconds>((now - changed_) / kLooksPerWait, kShortestPeriod, kLongestPeriod);
}

}  // namespace flashpack::internal
