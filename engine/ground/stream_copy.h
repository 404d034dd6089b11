/// Copies of bytes that this CPU will not read again soon.
///
/// Thread safety: any thread, for bytes that no other thread uses.
#pragma once

#include <cstddef>

namespace flashpack::internal {

/// As std::memcpy, but many bytes go past the CPU's caches, where the CPU can do that: the old bytes of the destination
/// need not be read first. They are there for other threads as after std::memcpy.
void stream_copy(std::byte* to, const std::byte* from, std::size_t size_bytes) noexcept;

}  // namespace flashpack::internal
