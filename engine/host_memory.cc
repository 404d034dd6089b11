#include "flashpack/host_memory.h"

#include <algorithm>
#include <cerrno>
#include <string>

#include "engine/ground/error.h"
#include "engine/ground/host_region.h"
#include "engine/ground/rounding.h"
#include "engine/ground/target_pages.h"

namespace flashpack {

namespace {

using internal::kHugePageBytes;
using internal::kPageBytes;
using internal::TargetPages;

// More than any address space has, and little enough that sums of sizes do not overflow.
constexpr std::size_t kMostBytes = std::size_t{1} << 62;

// The fresh pages of little memory cost little, and pages that are kept are kept in units of huge ones.
bool is_small(std::size_t size_bytes) { return size_bytes < kHugePageBytes; }

std::span<std::byte> map_small(std::size_t size_bytes) {
  const std::span memory = internal::map_memory(std::max<std::size_t>(size_bytes, 1), kPageBytes);
  if (memory.empty()) throw internal::map_error(size_bytes, "tensors");
  return memory;
}

}  // namespace

HostMemoryPool::HostMemoryPool() : pages_(std::make_shared<TargetPages>()) {}
std::uint64_t HostMemoryPool::kept_bytes() const noexcept { return pages_->kept_bytes(); }
void HostMemoryPool::release_kept() const noexcept { pages_->release_kept(); }

HostMemory::HostMemory(const HostMemoryPool& pool, std::size_t size_bytes, std::uint64_t offset_bytes) : pool_(pool) {
  // Sums of sizes must not wrap, and no system has so much.
  if (size_bytes > kMostBytes)
    throw Error(internal::errno_code(ENOMEM), "map " + std::to_string(size_bytes) + " bytes of memory for tensors");
  const bool small = is_small(size_bytes);
  const std::size_t before_bytes = offset_bytes % (small ? kPageBytes : kHugePageBytes);
  pages_ = small ? map_small(before_bytes + size_bytes) : pool_.pages_->take(before_bytes, size_bytes);
  bytes_ = pages_.subspan(before_bytes, size_bytes);
}

HostMemory::~HostMemory() {
  if (pages_.empty()) return;
  if (is_small(bytes_.size())) {
    internal::unmap(pages_);
  } else {
    pool_.pages_->give_back(pages_);
  }
}

}  // namespace flashpack
