/// The settings that flashpack_tune measures, and what it has measured of them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "flashpack/transfer.h"

namespace flashpack::bench {

/// The options that are tuned. No workers and no staging_bytes mean what the engine chooses, or as much staging memory
/// as the reads in flight need, if that is more.
struct Setting {
  std::uint32_t chunk_bytes = 0;
  std::uint32_t queue_depth = 0;
  std::uint32_t workers = 0;
  std::uint64_t staging_bytes = 0;
  Backend backend = Backend::kAuto;
  bool operator==(const Setting&) const = default;
};

/// Adds a setting unless it is there.
void add_new(std::vector<Setting>& settings, const Setting& setting);

/// The seconds in which half of the requests, 95 and 99 of a hundred were answered.
struct Latency {
  double p50_s = 0;
  double p95_s = 0;
  double p99_s = 0;
};

/// A cell holds the medians of the samples of one setting.
struct Cell {
  Setting setting;
  int samples = 0;
  double gb_per_s = 0;
  double cpu_s_per_gb = 0;
  std::optional<Latency> latency = std::nullopt;  ///< None if it has not been measured.
};

/// Takes the nearest rank. Requires: not empty.
Latency latency_of(std::vector<double> seconds);

}  // namespace flashpack::bench
