/// Loads by an engine so small that a few MiB are many chunks to it.
#pragma once

#include <filesystem>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/units.h"

namespace flashpack::testing {

inline EngineOptions small_engine(Backend backend = Backend::kAuto) {
  return {.chunk_bytes = kMiB, .staging_bytes = 4 * kMiB, .workers = 2, .backend = backend};
}

/// Asks for the beginning of a file, as much as there is memory.
inline LoadRequest request(const std::filesystem::path& path, GuardedMemory& memory,
                           CachePolicy cache = CachePolicy::kAuto) {
  return {.files = {{.path = path, .extents = {{0, memory.size(), memory.data()}}}}, .cache = cache};
}

inline bool right(const GuardedMemory& memory, const std::vector<std::byte>& bytes) {
  return memory.intact() && same_bytes(memory.data(), bytes.data(), memory.size());
}

}  // namespace flashpack::testing
