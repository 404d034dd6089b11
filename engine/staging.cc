#include "engine/staging.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <system_error>

#include "engine/error.h"
#include "engine/plan.h"

namespace flashpack::internal {

namespace {

constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;

// 0, or an errno. By system call, because libnuma is more than is needed for it.
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
    : mapping_(nullptr), mapping_bytes_(round_up(total_bytes, kHugePageBytes) + kHugePageBytes) {
  slots_.reserve(total_bytes / slot_bytes);
  mapping_ =
      ::mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "map staging memory");
  // All are wishes: without huge pages it is slower, without DONTFORK a fork in the middle of a load costs copies.
  ::madvise(mapping_, mapping_bytes_, MADV_HUGEPAGE);
  ::madvise(mapping_, mapping_bytes_, MADV_DONTFORK);
  if (const int error = numa_node < 0 ? 0 : prefer_node(mapping_, mapping_bytes_, numa_node)) {
    fallback_reason_ = "staging on NUMA node " + std::to_string(numa_node) + ": " + errno_code(error).message();
  }
  auto* base = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<std::uintptr_t>(mapping_), kHugePageBytes));
  for (std::uint64_t at = 0; at + slot_bytes <= total_bytes; at += slot_bytes)
    slots_.emplace_back(base + at, slot_bytes);
}

Staging::~Staging() { ::munmap(mapping_, mapping_bytes_); }

}  // namespace flashpack::internal
