#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "tests/support/bulk.h"

namespace flashpack::testing {

/// `size` bytes whose address is `phase` modulo 4096, between canaries, between inaccessible pages. The kernel writes
/// into targets behind the back of ASan; this shows a byte too many.
class GuardedMemory {
 public:
  explicit GuardedMemory(std::size_t size, std::size_t phase = 0) : size_(size), phase_(phase % kPage) {
    body_ =
        (phase_ + size_ + kPage - 1) / kPage * kPage + kPage;  // A page more, so that there is always a canary behind.
    void* at = ::mmap(nullptr, body_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::runtime_error("mmap");
    base_ = static_cast<std::byte*>(at) + kPage;
    if (::mprotect(base_, body_, PROT_READ | PROT_WRITE) != 0) throw std::runtime_error("mprotect");
    fill_bytes(base_, kCanary, body_);
  }
  ~GuardedMemory() { ::munmap(base_ - kPage, body_ + 2 * kPage); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  std::byte* data() { return base_ + phase_; }
  const std::byte* data() const { return base_ + phase_; }
  std::size_t size() const { return size_; }

  bool intact() const {
    const std::size_t end = phase_ + size_;
    return all_bytes_are(kCanary, base_, phase_) && all_bytes_are(kCanary, base_ + end, body_ - end);
  }

 private:
  static constexpr std::size_t kPage = 4096;
  static constexpr std::byte kCanary{0xA5};
  std::size_t size_;
  std::size_t phase_;
  std::size_t body_ = 0;
  std::byte* base_ = nullptr;
};

}  // namespace flashpack::testing
