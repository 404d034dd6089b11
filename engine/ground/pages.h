/// The kernel's pages of memory.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <unistd.h>

#include <cstdint>

#include "engine/ground/rounding.h"

namespace flashpack::internal {

/// The kernel's page, 4096 to 65,536 bytes. cachestat(2), mincore(2) and madvise(2) count in it, and a fork
/// shares memory in units of it.
inline std::uint32_t system_page_bytes() noexcept {
  static const auto bytes = static_cast<std::uint32_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace flashpack::internal
