#pragma once

#include <cstddef>
#include <span>

namespace flashpack::bench {

/// Anonymous memory, 2 MiB aligned and on huge pages where the system grants them. Owns it. Throws: std::system_error.
class HugeMemory {
 public:
  /// Untouched: the first store to each page pays for the page.
  explicit HugeMemory(std::size_t size_bytes);
  HugeMemory(HugeMemory&& other) noexcept;
  HugeMemory& operator=(HugeMemory&&) = delete;
  ~HugeMemory();

  /// Makes every page present, so that what is timed afterwards pays for none.
  void touch();

  std::byte* data() const { return data_; }
  std::span<std::byte> bytes() const { return {data_, size_bytes_}; }

 private:
  std::byte* mapping_ = nullptr;
  std::size_t mapping_bytes_ = 0;
  std::byte* data_ = nullptr;
  std::size_t size_bytes_ = 0;
};

}  // namespace flashpack::bench
