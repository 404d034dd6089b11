/// All fuzzers of metadata check these promises, because every reader relies on them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "flashpack/format.h"

namespace flashpack::fuzz {

inline constexpr std::uint64_t kPayloadBytes = 1 << 20;

inline void check(bool holds) {
  if (!holds) std::abort();
}

/// Every tensor of a file that is accepted lies in its payload and has the size that its dtype and shape say.
inline void check_ranges(const Metadata& metadata, std::uint64_t payload_begin) {
  for (const TensorRecord& record : metadata.records) {
    check(record.offset_bytes >= payload_begin && record.offset_bytes <= metadata.payload_bytes);
    check(record.size_bytes <= metadata.payload_bytes - record.offset_bytes);
    std::uint64_t size_bytes = element_bytes(record.dtype);
    for (const std::int64_t dim : record.shape) size_bytes *= static_cast<std::uint64_t>(dim);
    check(size_bytes == record.size_bytes);
  }
}

/// Runs `body` on the text of one input. It may throw nothing but the errors for bad files.
template <typename Body>
int run(const std::uint8_t* data, std::size_t size_bytes, Body body) {
  try {
    body(std::string_view(reinterpret_cast<const char*>(data), size_bytes));
  } catch (const Error& error) {
    check(error.code() == Errc::kBadFile);
  }
  return 0;
}

}  // namespace flashpack::fuzz
