#include "engine/staging.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <utility>

#include "engine/ground/error.h"
#include "engine/ground/rounding.h"

namespace flashpack::internal {

namespace {

// Returns 0 or an errno. It makes the system call itself, because libnuma would be a dependency for this one line.
int prefer_node(void* memory, std::size_t size_bytes, int node) {
  constexpr int kPreferred = 1;    // MPOL_PREFERRED of <linux/mempolicy.h>.
  constexpr int kMaxNodes = 1024;  // The most that Linux is built for.
  std::array<std::uint64_t, kMaxNodes / 64> nodes{};
  if (node >= kMaxNodes) return EINVAL;
  const auto index = static_cast<std::size_t>(node);
  nodes[index / 64] = std::uint64_t{1} << index % 64;
  return ::syscall(SYS_mbind, memory, size_bytes, kPreferred, nodes.data(), kMaxNodes + 1, 0) == 0 ? 0 : errno;
}

}  // namespace

Staging::Staging(std::uint64_t total_bytes, std::uint32_t slot_bytes, int numa_node)
    : own_(std::in_place, round_up(total_bytes, kHugePageBytes), "staging") {
  const std::span<std::byte> memory = own_->bytes();
  // If the system refuses, a fork during a load costs copies of pages.
  ::madvise(memory.data(), memory.size(), MADV_DONTFORK);
  if (const int error = numa_node < 0 ? 0 : prefer_node(memory.data(), memory.size(), numa_node)) {
    fallback_reason_ = "staging on NUMA node " + std::to_string(numa_node) + ": " + errno_code(error).message();
  }
  cut(memory.first(total_bytes), slot_bytes);
}

Staging::Staging(std::span<std::byte> memory, std::uint32_t slot_bytes, std::uint64_t own_bytes)
    : borrowed_(memory.first(round_down(memory.size(), slot_bytes))) {
  if (own_bytes > 0) {
    own_.emplace(round_up(own_bytes, kHugePageBytes), "staging");
    ::madvise(own_->data(), own_->bytes().size(), MADV_DONTFORK);
  }
  ::madvise(borrowed_.data(), borrowed_.size(), MADV_DONTFORK);
  cut(borrowed_, slot_bytes);
  if (own_) cut(own_->bytes().first(own_bytes), slot_bytes);
}

Staging::~Staging() {
  if (!borrowed_.empty()) ::madvise(borrowed_.data(), borrowed_.size(), MADV_DOFORK);
}

void Staging::cut(std::span<std::byte> memory, std::uint32_t slot_bytes) {
  slots_.reserve(slots_.size() + memory.size() / slot_bytes);
  for (std::size_t at = 0; at + slot_bytes <= memory.size(); at += slot_bytes)
    slots_.push_back(memory.subspan(at, slot_bytes));
}

}  // namespace flashpack::internal
