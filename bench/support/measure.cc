#include "bench/support/measure.h"

#include <sys/resource.h>

#include <chrono>
#include <cstring>

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

}  // namespace

Sample measure(const std::function<void()>& work) {
  const double cpu_before = process_cpu_seconds();
  const auto before = std::chrono::steady_clock::now();
  work();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - before;
  return {.seconds = elapsed.count(), .cpu_seconds = process_cpu_seconds() - cpu_before};
}

void touch(std::span<std::byte> memory) { std::memset(memory.data(), 0xA5, memory.size()); }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

}  // namespace flashpack::bench
