#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "flashpack/trace.h"

namespace flashpack::bench {

/// Takes down when the steps of one engine were under way. Any thread may call any member.
class StepTimes final : public TraceSink {
 public:
  struct Totals {
    /// The most steps of one stage that were under way at a time, of the four that read or write files. Reads past the
    /// page cache and reads through it are two stages, so that those are not added to each other.
    std::uint32_t depth = 0;
    /// The shares of the transfers' time in which at least one read or write of a file was under way, and at least one
    /// copy between staging memory and its place.
    double io_share = 0;
    double copy_share = 0;
  };

  void event(const TraceEvent& event) noexcept override;
  Totals totals() const;

 private:
  struct Interval {
    TraceEvent::Time begin, end;
  };
  using Intervals = std::vector<Interval>;

  static double seconds_covered_by(Intervals intervals);

  mutable std::mutex mutex_;
  Intervals transfers_, io_, copies_;
  std::uint32_t depth_ = 0;
};

}  // namespace flashpack::bench
