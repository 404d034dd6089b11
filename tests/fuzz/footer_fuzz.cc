#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "flashpack/format.h"

namespace {

constexpr std::uint64_t kPayloadBytes = 1 << 20;

void check(bool holds) {
  if (!holds) std::abort();
}

/// What read_metadata() promises of every file it accepts.
void check_ranges(const flashpack::Metadata& metadata) {
  for (const flashpack::TensorRecord& record : metadata.records) {
    check(record.offset_bytes <= kPayloadBytes && record.size_bytes <= kPayloadBytes - record.offset_bytes);
    check(record.offset_bytes % flashpack::element_bytes(record.dtype) == 0);
  }
}

}  // namespace

/// `data` is the JSON of a footer.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size_bytes) {
  const std::string_view json(reinterpret_cast<const char*>(data), size_bytes);
  try {
    const flashpack::Metadata metadata = flashpack::parse_footer(json, kPayloadBytes, "fuzz");
    check_ranges(metadata);
    const std::string footer = flashpack::encode_footer(metadata);
    const std::string_view written = std::string_view(footer).substr(0, footer.size() - 16);
    // What is accepted can be written, and reads as the same: anything thrown here is a finding.
    const auto again = [&]() noexcept { return flashpack::parse_footer(written, kPayloadBytes, "again"); }();
    check(flashpack::encode_footer(again) == footer);
  } catch (const flashpack::Error& error) {
    check(error.code() == flashpack::Errc::kBadFile);
  }
  return 0;
}
