#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "tests/fuzz/checks.h"

using namespace flashpack;

/// `data` is the JSON of a footer.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size_bytes) {
  return fuzz::run(data, size_bytes, [](std::string_view json) {
    const Metadata metadata = parse_footer(json, fuzz::kPayloadBytes, "fuzz");
    fuzz::check_ranges(metadata, 0);
    for (const TensorRecord& record : metadata.records)
      fuzz::check(record.offset_bytes % element_bytes(record.dtype) == 0);
    const std::string footer = encode_footer(metadata);
    const std::string_view written = std::string_view(footer).substr(0, footer.size() - 16);
    // What is accepted can be written, and reads as the same: anything thrown here is a finding.
    const auto again = [&]() noexcept { return parse_footer(written, fuzz::kPayloadBytes, "again"); }();
    fuzz::check(encode_footer(again) == footer);
  });
}
