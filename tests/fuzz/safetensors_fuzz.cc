#include <cstddef>
#include <cstdint>
#include <string_view>

#include "tests/fuzz/checks.h"

using namespace flashpack;

/// `data` is the JSON of a header.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size_bytes) {
  return fuzz::run(data, size_bytes, [](std::string_view json) {
    const std::uint64_t payload_begin = sizeof(std::uint64_t) + json.size();
    const Metadata metadata = parse_safetensors_header(json, payload_begin + fuzz::kPayloadBytes, "fuzz");
    fuzz::check_ranges(metadata, payload_begin);
    std::uint64_t covered = payload_begin;
    for (const TensorRecord& record : metadata.records) {
      fuzz::check(record.offset_bytes == covered);
      covered += record.size_bytes;
    }
    fuzz::check(covered == metadata.payload_bytes);
  });
}
