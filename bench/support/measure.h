#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace flashpack::bench {

/// The cost of one run of some work.
struct Sample {
  double seconds = 0;
  double cpu_seconds = 0;  ///< User and system time of every thread of this process.
};

Sample measure(const std::function<void()>& work);

/// Makes every page present, so that page faults are not timed afterwards.
void touch(std::span<std::byte> memory);

/// The growth of this process's resident memory. One at a time, because the kernel keeps one peak for the process.
class PeakMemory {
 public:
  PeakMemory();
  /// Returns the most that was resident at a time since the constructor, less what was resident then. 0 where the
  /// kernel does not let the process begin a new peak.
  std::uint64_t grown_bytes() const;

 private:
  std::uint64_t before_bytes_;
};

/// The middle value, or the mean of the two middle ones. Requires: not empty.
double median(std::vector<double> values);

/// The summary of the samples of one figure.
struct Summary {
  double median = 0;
  double min = 0;
  double max = 0;
};

/// Requires: not empty.
Summary summarize(const std::vector<double>& values);

/// Samples of the same work, each of which moves `size_bytes`.
class Series {
 public:
  explicit Series(std::uint64_t size_bytes) : gigabytes_(static_cast<double>(size_bytes) / 1e9) {}

  void add(const Sample& sample) {
    seconds_.push_back(sample.seconds);
    cpu_seconds_.push_back(sample.cpu_seconds);
  }
  Summary rates() const {
    const Summary seconds = summarize(seconds_);
    return {.median = gigabytes_ / seconds.median, .min = gigabytes_ / seconds.max, .max = gigabytes_ / seconds.min};
  }
  double gb_per_s() const { return rates().median; }
  double cpu_s_per_gb() const { return median(cpu_seconds_) / gigabytes_; }
  /// Half the distance between the quickest and the slowest sample, relative to the median.
  double spread() const {
    const Summary seconds = summarize(seconds_);
    return (seconds.max - seconds.min) / 2 / seconds.median;
  }

 private:
  double gigabytes_;
  std::vector<double> seconds_;
  std::vector<double> cpu_seconds_;
};

}  // namespace flashpack::bench
