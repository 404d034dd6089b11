/// The values that EngineOptions may have, for all who check them.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <bit>
#include <cstdint>

#include "flashpack/engine.h"

namespace flashpack::internal {

// Where no reason is given, these are bounds on what a slip of a digit can cost, and not tuned.
constexpr std::uint32_t kMinChunkBytes = std::uint32_t{1} << 20;  // A stripe never reaches over a chunk.
constexpr std::uint32_t kMaxChunkBytes = std::uint32_t{1} << 30;
constexpr std::uint32_t kMaxQueueDepth = 1024;
constexpr std::uint32_t kMinSlots = 2;      // One is read to while the other is copied.
constexpr std::uint32_t kMaxSlots = 16384;  // io_uring can register no more.
constexpr std::uint32_t kMaxWorkers = 64;
constexpr std::uint32_t kMaxMoreDevices = 63;

// They take 64 bits, so that a number from a file is judged before it is narrowed.
constexpr bool is_chunk_size(std::uint64_t bytes) {
  return std::has_single_bit(bytes) && bytes >= kMinChunkBytes && bytes <= kMaxChunkBytes;
}
constexpr bool is_queue_depth(std::uint64_t depth) { return depth >= 1 && depth <= kMaxQueueDepth; }
/// 0 leaves the number to the engine.
constexpr bool is_number_of_workers(std::uint64_t workers) { return workers <= kMaxWorkers; }
constexpr bool is_number_of_more_devices(std::uint64_t devices) { return devices <= kMaxMoreDevices; }
constexpr bool is_number_of_slots(std::uint64_t slots) { return slots >= kMinSlots && slots <= kMaxSlots; }

/// The staging memory of an engine whose options leave it open: 16 chunks of 4 MiB, twice the queue depth, so that
/// slots can be copied while the disk fills others. For a device it is what the sweep in bench/README.md has found;
/// that of the host is not tuned.
constexpr std::uint64_t usual_staging_bytes(Device::Kind kind) {
  return std::uint64_t{kind == Device::Kind::kCuda ? 96u : 64u} << 20;
}

}  // namespace flashpack::internal
