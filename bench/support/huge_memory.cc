#include "bench/support/huge_memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <utility>

namespace flashpack::bench {

namespace {
constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;
}

HugeMemory::HugeMemory(std::size_t size_bytes) : mapping_bytes_(size_bytes + kHugePageBytes), size_bytes_(size_bytes) {
  void* mapping = ::mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "map memory");
  mapping_ = static_cast<std::byte*>(mapping);
  const auto misalignment = reinterpret_cast<std::uintptr_t>(mapping_) % kHugePageBytes;
  data_ = mapping_ + (misalignment == 0 ? 0 : kHugePageBytes - misalignment);
  // Refused only where huge pages are off; small pages are then what every reader gets.
  ::madvise(data_, size_bytes_, MADV_HUGEPAGE);
}

HugeMemory::HugeMemory(HugeMemory&& other) noexcept
    : mapping_(std::exchange(other.mapping_, nullptr)),
      mapping_bytes_(other.mapping_bytes_),
      data_(other.data_),
      size_bytes_(other.size_bytes_) {}

HugeMemory::~HugeMemory() {
  if (mapping_ != nullptr) ::munmap(mapping_, mapping_bytes_);
}

void HugeMemory::touch() { std::memset(data_, 0xA5, size_bytes_); }

}  // namespace flashpack::bench
