#include "engine/ground/host_region.h"

#include <sys/mman.h>

#include <string>

#include "engine/ground/error.h"
#include "engine/ground/pages.h"

namespace flashpack::internal {

std::span<std::byte> map_memory(std::size_t size_bytes, std::uint64_t alignment_bytes) noexcept {
  const std::size_t pages_bytes = round_up(size_bytes, system_page_bytes());
  const std::size_t spare_bytes = alignment_bytes > system_page_bytes() ? alignment_bytes : 0;
  void* const mapping =
      ::mmap(nullptr, pages_bytes + spare_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return {};
  const std::span all(static_cast<std::byte*>(mapping), pages_bytes + spare_bytes);
  const auto address = reinterpret_cast<std::uintptr_t>(mapping);
  const std::size_t before_bytes = round_up(address, alignment_bytes) - address;
  unmap(all.first(before_bytes));
  unmap(all.subspan(before_bytes + pages_bytes));
  return all.subspan(before_bytes, size_bytes);
}

void unmap(std::span<std::byte> memory) noexcept {
  if (!memory.empty()) ::munmap(memory.data(), memory.size());
}

Error map_error(std::size_t size_bytes, const char* purpose) {
  return Error(errno_code(errno), "map " + std::to_string(size_bytes) + " bytes of memory for " + purpose);
}

void advise_huge_pages(std::span<std::byte> memory) noexcept {
  const auto begin = reinterpret_cast<std::uintptr_t>(memory.data());
  const std::uint64_t first = round_up(begin, kHugePageBytes);
  const std::uint64_t last = round_down(begin + memory.size(), kHugePageBytes);
  if (first < last) ::madvise(memory.data() + (first - begin), last - first, MADV_HUGEPAGE);
}

HostRegion::HostRegion(std::size_t size_bytes, const char* purpose)
    : bytes_(map_memory(size_bytes, size_bytes < kHugePageBytes ? kPageBytes : kHugePageBytes)) {
  if (bytes_.empty()) throw map_error(size_bytes, purpose);
  advise_huge_pages(bytes_);
}

}  // namespace flashpack::internal
