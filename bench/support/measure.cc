#include "bench/support/measure.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

namespace flashpack::bench {

namespace {

double process_cpu_seconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Reads a line of /proc/self/status that is in kB.
std::uint64_t status_bytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    std::uint64_t kilobytes = 0;
    if (word == key + ":" && status >> kilobytes) return kilobytes * 1024;
  }
  return 0;
}

}  // namespace

Sample measure(const std::function<void()>& work) {
  const double cpu_before = process_cpu_seconds();
  const auto before = std::chrono::steady_clock::now();
  work();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - before;
  return {.seconds = elapsed.count(), .cpu_seconds = process_cpu_seconds() - cpu_before};
}

void touch(std::span<std::byte> memory) { std::memset(memory.data(), 0xA5, memory.size()); }

PeakMemory::PeakMemory() {
  const bool is_reset = (std::ofstream("/proc/self/clear_refs") << "5").flush().good();
  before_bytes_ = is_reset ? status_bytes("VmRSS") : std::numeric_limits<std::uint64_t>::max();
}

std::uint64_t PeakMemory::grown_bytes() const {
  const std::uint64_t peak_bytes = status_bytes("VmHWM");
  return peak_bytes > before_bytes_ ? peak_bytes - before_bytes_ : 0;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

Summary summarize(const std::vector<double>& values) {
  const auto [min, max] = std::minmax_element(values.begin(), values.end());
  return {.median = median(values), .min = *min, .max = *max};
}

}  // namespace flashpack::bench
