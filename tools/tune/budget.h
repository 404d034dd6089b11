/// The time that flashpack_tune may take.
#pragma once

#include <chrono>

namespace flashpack::bench {

struct Budget {
  using Clock = std::chrono::steady_clock;

  double spent_s() const { return std::chrono::duration<double>(Clock::now() - begin).count(); }
  /// When this share of it is spent.
  Clock::time_point end_of(double share = 1) const {
    return begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(share * seconds));
  }

  Clock::time_point begin;
  double seconds = 0;
};

}  // namespace flashpack::bench
