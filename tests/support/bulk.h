/// Many bytes at once.
///
/// The thread sanitizer keeps account of each eight bytes that the tests touch, also by memcpy() and its like, and
/// spends more time on that than on all else. These functions show it the first byte of each page and the last of all,
/// which is enough to see two threads at the same chunk, extent or slot, and leave the rest out of the account.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tests/support/sanitizers.h"

// Functions that the thread sanitizer does not see: those of <cstring> would not be among them, nor what is inlined.
#if FLASHPACK_TSAN
#define FLASHPACK_UNSEEN __attribute__((noinline, no_sanitize("thread"))) inline
#else
#define FLASHPACK_UNSEEN inline
#endif

namespace flashpack::testing {

/// Not those of any library, because they are to cost little.
FLASHPACK_UNSEEN void fill_with_random_bytes(std::byte* to, std::size_t size_bytes, std::uint64_t seed) {
  std::uint64_t word = 0;
  for (std::size_t at = 0; at < size_bytes; ++at) {
    if (at % sizeof word == 0) {  // SplitMix64
      word = (seed += 0x9E3779B97F4A7C15);
      word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9;
      word = (word ^ (word >> 27)) * 0x94D049BB133111EB;
      word ^= word >> 31;
    }
    to[at] = static_cast<std::byte>(word >> at % sizeof word * 8);
  }
}

#if FLASHPACK_TSAN

namespace bulk {

using Word __attribute__((may_alias, aligned(1))) = std::uint64_t;

FLASHPACK_UNSEEN void fill(std::byte* to, std::byte value, std::size_t size_bytes) {
  const Word word = static_cast<Word>(value) * 0x0101'0101'0101'0101;
  std::size_t at = 0;
  for (; at + sizeof word <= size_bytes; at += sizeof word) *reinterpret_cast<Word*>(to + at) = word;
  for (; at < size_bytes; ++at) to[at] = value;
}

FLASHPACK_UNSEEN void copy(std::byte* to, const std::byte* from, std::size_t size_bytes) {
  std::size_t at = 0;
  for (; at + sizeof(Word) <= size_bytes; at += sizeof(Word))
    *reinterpret_cast<Word*>(to + at) = *reinterpret_cast<const Word*>(from + at);
  for (; at < size_bytes; ++at) to[at] = from[at];
}

FLASHPACK_UNSEEN bool same(const std::byte* a, const std::byte* b, std::size_t size_bytes) {
  std::size_t at = 0;
  for (; at + sizeof(Word) <= size_bytes; at += sizeof(Word)) {
    if (*reinterpret_cast<const Word*>(a + at) != *reinterpret_cast<const Word*>(b + at)) return false;
  }
  for (; at < size_bytes; ++at) {
    if (a[at] != b[at]) return false;
  }
  return true;
}

// Calls `access` with a byte of each page, and the last.
template <class Byte, class Access>
void show(Byte* memory, std::size_t size_bytes, Access access) {
  for (std::size_t at = 0; at < size_bytes; at += 4096) access(memory[at]);
  if (size_bytes > 0) access(memory[size_bytes - 1]);
}
inline void show_reads(const void* memory, std::size_t size_bytes) {
  show(static_cast<const volatile std::byte*>(memory), size_bytes,
       [](const volatile std::byte& byte) { static_cast<void>(static_cast<std::byte>(byte)); });
}
inline void show_writes(void* memory, std::size_t size_bytes) {
  show(static_cast<volatile std::byte*>(memory), size_bytes,
       [](volatile std::byte& byte) { byte = static_cast<std::byte>(byte); });
}

}  // namespace bulk

inline void fill_bytes(void* to, std::byte value, std::size_t size_bytes) {
  bulk::fill(static_cast<std::byte*>(to), value, size_bytes);
  bulk::show_writes(to, size_bytes);
}

/// They do not overlap.
inline void copy_bytes(void* to, const void* from, std::size_t size_bytes) {
  bulk::show_reads(from, size_bytes);
  bulk::copy(static_cast<std::byte*>(to), static_cast<const std::byte*>(from), size_bytes);
  bulk::show_writes(to, size_bytes);
}

inline bool same_bytes(const void* a, const void* b, std::size_t size_bytes) {
  bulk::show_reads(a, size_bytes);
  bulk::show_reads(b, size_bytes);
  return bulk::same(static_cast<const std::byte*>(a), static_cast<const std::byte*>(b), size_bytes);
}

#else

inline void fill_bytes(void* to, std::byte value, std::size_t size_bytes) {
  if (size_bytes > 0) std::memset(to, static_cast<int>(value), size_bytes);
}

/// They do not overlap.
inline void copy_bytes(void* to, const void* from, std::size_t size_bytes) {
  if (size_bytes > 0) std::memcpy(to, from, size_bytes);
}

inline bool same_bytes(const void* a, const void* b, std::size_t size_bytes) {
  return size_bytes == 0 || std::memcmp(a, b, size_bytes) == 0;
}

#endif

}  // namespace flashpack::testing

#undef FLASHPACK_UNSEEN
