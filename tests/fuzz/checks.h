/// All fuzzers of metadata check these promises, because every reader relies on them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "flashpack/format.h"
#include "torch_binding/format/json_reader.h"

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

/// The same JSON with blanks after its first byte, so that the reader's first window ends in the middle of the rest.
inline std::string in_two_windows(std::string_view text) {
  std::string longer(text);
  const std::size_t first = std::min<std::size_t>(text.size(), 1);
  return longer.insert(first, JsonReader::kWindowBytes - std::min(text.size() / 2, JsonReader::kWindowBytes), ' ');
}

/// Whether `body` takes the text. It may throw nothing but the errors for bad files.
template <typename Body>
bool accepts(std::string_view text, Body body) {
  try {
    body(text);
    return true;
  } catch (const Error& error) {
    check(error.code() == Errc::kBadFile);
    return false;
  }
}

/// Runs `body` on the text of one input. If it is accepted, it is in two windows, too. Those would be slow for all
/// inputs, of which few are accepted.
template <typename Body>
int run(const std::uint8_t* data, std::size_t size_bytes, Body body) {
  const std::string_view text(reinterpret_cast<const char*>(data), size_bytes);
  if (accepts(text, body)) check(accepts(in_two_windows(text), body));
  return 0;
}

}  // namespace flashpack::fuzz
