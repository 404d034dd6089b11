/// Many bytes at once, in functions that are optimised whatever the tests are.
///
/// The thread sanitizer keeps account of each eight bytes that the tests touch, also by memcpy() and its like, and
/// spends more time on that than on all else. These functions show it the first byte of each page and the last of all,
/// which is enough to see two threads at the same chunk, extent or slot, and leave the rest out of the account.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace flashpack::testing {

/// While it lives, the thread sanitizer sees nothing of what this thread reads and writes.
class Unseen {
 public:
  Unseen();
  ~Unseen();
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

/// These show the sanitizer one byte of each page, in place of the bytes that are Unseen.
void show_reads(const void* memory, std::size_t size_bytes);
void show_writes(void* memory, std::size_t size_bytes);

void fill_with_random_bytes(std::byte* to, std::size_t size_bytes, std::uint64_t seed);

void fill_bytes(void* to, std::byte value, std::size_t size_bytes);

/// They do not overlap.
void copy_bytes(void* to, const void* from, std::size_t size_bytes);

bool same_bytes(const void* a, const void* b, std::size_t size_bytes);

/// For vectors, whose own operator compares one byte after the other.
bool same_bytes(std::span<const std::byte> a, std::span<const std::byte> b);

bool all_bytes_are(std::byte value, const void* memory, std::size_t size_bytes);

}  // namespace flashpack::testing
