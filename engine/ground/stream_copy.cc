#include "engine/ground/stream_copy.h"

#include <cstdint>
#include <cstring>

// The sanitizers of GCC do not see such stores.
#if defined(__SSE2__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FLASHPACK_STREAMS
#include <emmintrin.h>
#endif

namespace flashpack::internal {

#ifdef FLASHPACK_STREAMS

namespace {

constexpr std::size_t kLineBytes = 64;
// Fewer bytes are likely to be used while they are in a cache. A bound, and not tuned.
constexpr std::size_t kLeastBytes = 64 << 10;

void stream_line(std::byte* to, const std::byte* from) noexcept {
  for (std::size_t i = 0; i < kLineBytes; i += sizeof(__m128i)) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), bytes);
  }
}

}  // namespace

void stream_copy(std::byte* to, const std::byte* from, std::size_t size_bytes) noexcept {
  std::size_t done = 0;
  if (size_bytes >= kLeastBytes) {
    done = -reinterpret_cast<std::uintptr_t>(to) % kLineBytes;
    std::memcpy(to, from, done);
    for (; done + kLineBytes <= size_bytes; done += kLineBytes) stream_line(to + done, from + done);
    _mm_sfence();  // Such stores are not in the order of others, which a lock or an atomic would see to.
  }
  std::memcpy(to + done, from + done, size_bytes - done);
}

#else

void stream_copy(std::byte* to, const std::byte* from, std::size_t size_bytes) noexcept {
  std::memcpy(to, from, size_bytes);
}

#endif

}  // namespace flashpack::internal
