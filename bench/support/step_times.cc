#include "bench/support/step_times.h"

#include <algorithm>
#include <chrono>

namespace flashpack::bench {

void StepTimes::event(const TraceEvent& event) noexcept {
  const std::lock_guard lock(mutex_);
  const Interval interval{event.begin, event.end};
  switch (event.stage) {
    case TraceStage::kRead:
    case TraceStage::kReadCached:
    case TraceStage::kWrite:
    case TraceStage::kWriteCached:
      io_.push_back(interval);
      depth_ = std::max(depth_, event.depth);
      return;
    case TraceStage::kCopy:
      return copies_.push_back(interval);
    case TraceStage::kTransfer:
      return transfers_.push_back(interval);
    case TraceStage::kPopulate:
    case TraceStage::kChecksum:
    case TraceStage::kWait:
    case TraceStage::kOpen:
    case TraceStage::kClose:
      return;
  }
}

StepTimes::Totals StepTimes::totals() const {
  const std::lock_guard lock(mutex_);
  const double all = seconds_covered_by(transfers_);
  if (all == 0) return {};
  return {depth_, seconds_covered_by(io_) / all, seconds_covered_by(copies_) / all};
}

// Intervals that overlap count once.
double StepTimes::seconds_covered_by(Intervals intervals) {
  std::sort(intervals.begin(), intervals.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  std::chrono::duration<double> covered{};
  TraceEvent::Time end{};
  for (const Interval& interval : intervals) {
    const TraceEvent::Time begin = std::max(interval.begin, end);
    if (interval.end > begin) covered += interval.end - begin;
    end = std::max(end, interval.end);
  }
  return covered.count();
}

}  // namespace flashpack::bench
