#pragma once

#include <unistd.h>

#include <cstdint>

namespace flashpack::internal {

/// The kernel's page, 4096 to 65,536 bytes: what cachestat(2) counts, mincore(2) and madvise(2) go by and a fork
/// shares.
inline std::uint32_t system_page_bytes() noexcept {
  static const auto bytes = static_cast<std::uint32_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace flashpack::internal
