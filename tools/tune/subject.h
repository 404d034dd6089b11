/// Loads and writes of flashpack_tune with given settings, and what it measures them on.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "bench/support/checkpoint.h"
#include "bench/support/device_memory.h"
#include "bench/support/measure.h"
#include "engine/ground/host_region.h"
#include "flashpack/engine.h"
#include "tools/tune/cell.h"

namespace flashpack::bench {

inline const Setting kUsual{EngineOptions().chunk_bytes, EngineOptions().queue_depth, EngineOptions().workers,
                            EngineOptions().staging_bytes};

EngineOptions options_of(const Setting& setting, Device device);

enum class Work { kDisk, kPageCache, kWrites };

/// The file that is read, host memory of its size whose pages are there already, and GPU memory of its size if loads go
/// to a GPU.
struct Subject {
  /// Makes the file, of about `size_bytes`. With `verify`, loads compare its checksums. Throws: Error; std::exception
  /// without such a device or memory on it.
  Subject(const std::filesystem::path& file, std::uint64_t size_bytes, Device to, bool verify);

  const LoadRequest& request(Work work) const { return work == Work::kPageCache ? from_page_cache : from_disk; }
  /// A sample of this work moves so many bytes, by which its time becomes a speed.
  std::uint64_t sample_bytes(Work work) const;

  Device device;
  Checkpoint checkpoint;
  internal::HostRegion memory;
  std::optional<DeviceMemory> device_memory;
  std::byte* target = nullptr;  ///< One of these two.
  LoadRequest from_disk;
  LoadRequest from_page_cache;
  int loads_from_page_cache = 1;     ///< So many are one sample.
  std::uint32_t usual_workers = 0;   ///< The engine's own choice, known after a sample with it.
  std::uint64_t verified_bytes = 0;  ///< In the last load.
  std::string fallback_reason;
};

/// Measures `work` once. Throws: Error.
Sample sample(Subject& subject, const Setting& setting, Work work);

/// How much of the file the page cache has when a load begins.
enum class Cached { kNothing, kWhole };

/// Measures one load of what fit() has left for the disk, with a cache policy. With kWhole, the caller has warmed the
/// page cache. Throws: Error; std::exception.
Sample sample_policy(Subject& subject, const Setting& setting, CachePolicy policy, Cached cached);

/// Leaves so much to read that one sample takes from half of `seconds` to about as long, but at least 64 MiB and at
/// most the file, and a third of them at least from the page cache. Reads little more than that from a slow disk.
void fit(Subject& subject, Work work, double seconds);

/// Loads the whole file with a setting, past the page cache and through it. Throws: std::runtime_error unless the
/// memory that loads go to has its bytes each time; Error.
void check_bytes(Subject& subject, const Setting& setting);

/// GB/s of plain copies of the file from the page cache to host memory by all cores.
double copies_gb_per_s(const Subject& subject);

}  // namespace flashpack::bench
