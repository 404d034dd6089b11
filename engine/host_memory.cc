#include "flashpack/host_memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <string>

#include "engine/ground/error.h"
#include "engine/ground/pages.h"
#include "engine/ground/target_pages.h"

namespace flashpack {

namespace {

using internal::kHugePageBytes;
using internal::kPageBytes;
using internal::TargetPages;

// The fresh pages of little memory cost little, and pages that are kept are kept in units of huge ones.
bool is_small(std::size_t size_bytes) { return size_bytes < kHugePageBytes; }

std::span<std::byte> map_small(std::size_t size_bytes) {
  void* const mapping = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping != MAP_FAILED) return {static_cast<std::byte*>(mapping), size_bytes};
  throw Error(internal::errno_code(errno), "map " + std::to_string(size_bytes) + " bytes of memory for tensors");
}

}  // namespace

HostMemory::HostMemory(std::size_t size_bytes, std::uint64_t offset_bytes) {
  const bool small = is_small(size_bytes);
  const std::size_t before_bytes = offset_bytes % (small ? kPageBytes : kHugePageBytes);
  pages_ = small ? map_small(before_bytes + size_bytes) : TargetPages::of_process().take(before_bytes, size_bytes);
  bytes_ = pages_.subspan(before_bytes, size_bytes);
}

HostMemory::~HostMemory() {
  if (pages_.empty()) return;
  if (is_small(bytes_.size())) {
    ::munmap(pages_.data(), pages_.size());
  } else {
    TargetPages::of_process().give_back(pages_);
  }
}

std::uint64_t HostMemory::kept_bytes() noexcept { return TargetPages::of_process().kept_bytes(); }

void HostMemory::release_kept() noexcept { TargetPages::of_process().release_kept(); }

}  // namespace flashpack
