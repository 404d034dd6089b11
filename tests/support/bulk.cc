#include "tests/support/bulk.h"

#include <cstring>

#include "tests/support/sanitizers.h"

#if FLASHPACK_TSAN
extern "C" {  // Its runtime has these.
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace flashpack::testing {
namespace {

// Calls `access` with a byte of each page, and the last.
template <class Byte, class Access>
void show([[maybe_unused]] Byte* memory, [[maybe_unused]] std::size_t size_bytes, [[maybe_unused]] Access access) {
#if FLASHPACK_TSAN
  for (std::size_t at = 0; at < size_bytes; at += 4096) access(memory[at]);
  if (size_bytes > 0) access(memory[size_bytes - 1]);
#endif
}

}  // namespace

#if FLASHPACK_TSAN
Unseen::Unseen() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Unseen::~Unseen() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#else
Unseen::Unseen() = default;
Unseen::~Unseen() = default;
#endif

void show_reads(const void* memory, std::size_t size_bytes) {
  show(static_cast<const volatile std::byte*>(memory), size_bytes,
       [](const volatile std::byte& byte) { static_cast<void>(static_cast<std::byte>(byte)); });
}

void show_writes(void* memory, std::size_t size_bytes) {
  show(static_cast<volatile std::byte*>(memory), size_bytes,
       [](volatile std::byte& byte) { byte = static_cast<std::byte>(byte); });
}

// The generators of libraries cost more.
void fill_with_random_bytes(std::byte* to, std::size_t size_bytes, std::uint64_t seed) {
  const Unseen unseen;
  for (std::size_t at = 0; at < size_bytes; at += sizeof seed) {  // SplitMix64
    std::uint64_t word = (seed += 0x9E3779B97F4A7C15);
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB;
    word ^= word >> 31;
    if (size_bytes - at >= sizeof word) {
      std::memcpy(to + at, &word, sizeof word);
    } else {
      std::memcpy(to + at, &word, size_bytes - at);
    }
  }
}

void fill_bytes(void* to, std::byte value, std::size_t size_bytes) {
  if (size_bytes == 0) return;
  {
    const Unseen unseen;
    std::memset(to, static_cast<int>(value), size_bytes);
  }
  show_writes(to, size_bytes);
}

void copy_bytes(void* to, const void* from, std::size_t size_bytes) {
  if (size_bytes == 0) return;
  show_reads(from, size_bytes);
  {
    const Unseen unseen;
    std::memcpy(to, from, size_bytes);
  }
  show_writes(to, size_bytes);
}

bool same_bytes(const void* a, const void* b, std::size_t size_bytes) {
  if (size_bytes == 0) return true;
  show_reads(a, size_bytes);
  show_reads(b, size_bytes);
  const Unseen unseen;
  return std::memcmp(a, b, size_bytes) == 0;
}

bool same_bytes(std::span<const std::byte> a, std::span<const std::byte> b) {
  return a.size() == b.size() && same_bytes(a.data(), b.data(), a.size());
}

bool all_bytes_are(std::byte value, const void* memory, std::size_t size_bytes) {
  if (size_bytes == 0) return true;
  const auto* const bytes = static_cast<const std::byte*>(memory);
  return bytes[0] == value && same_bytes(bytes, bytes + 1, size_bytes - 1);
}

}  // namespace flashpack::testing
