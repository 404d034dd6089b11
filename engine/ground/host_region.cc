#include "engine/ground/host_region.h"

#include <sys/mman.h>

#include <string>

#include "engine/ground/error.h"
#include "engine/ground/pages.h"

namespace flashpack::internal {

namespace {

// Only the huge pages that lie wholly inside are asked for, because the others would hold memory that nobody uses.
void advise_huge_pages(std::span<std::byte> bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(bytes.data());
  const std::uint64_t first = round_up(begin, kHugePageBytes);
  const std::uint64_t last = round_down(begin + bytes.size(), kHugePageBytes);
  // A kernel without huge pages refuses, and small pages serve as well, only slower.
  if (first < last) ::madvise(bytes.data() + (first - begin), last - first, MADV_HUGEPAGE);
}

}  // namespace

HostRegion::HostRegion(std::size_t size_bytes, const char* purpose, std::uint64_t offset_bytes) {
  const std::uint64_t granule = size_bytes < kHugePageBytes ? std::uint64_t{kPageBytes} : kHugePageBytes;
  const std::size_t mapped_bytes = size_bytes + 2 * granule;  // Room to move data() to its phase.
  void* const mapping = ::mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) {
    throw Error(errno_code(errno), "map " + std::to_string(mapped_bytes) + " bytes of memory for " + purpose);
  }
  mapping_ = {static_cast<std::byte*>(mapping), mapped_bytes};
  const auto begin = reinterpret_cast<std::uintptr_t>(mapping);
  bytes_ = mapping_.subspan(round_up(begin, granule) - begin + offset_bytes % granule, size_bytes);
  advise_huge_pages(bytes_);
}

HostRegion::~HostRegion() {
  if (!mapping_.empty()) ::munmap(mapping_.data(), mapping_.size());
}

}  // namespace flashpack::internal
