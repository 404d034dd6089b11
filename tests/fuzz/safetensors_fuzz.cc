#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "tests/fuzz/checks.h"
#include "torch_binding/format/safetensors_header.h"

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

    // A header that was read can be written, and is read again as it was. Anything thrown here is a finding.
    std::vector<TensorSpec> tensors;
    for (const auto& [name, dtype, shape, begin, bytes] : metadata.records) tensors.push_back({name, dtype, shape});
    const auto header = [&]() noexcept { return make_safetensors_header(tensors, metadata.user_metadata); }();
    const std::string_view written = std::string_view(header.bytes).substr(sizeof(std::uint64_t));
    const std::uint64_t payload_bytes = metadata.payload_bytes - payload_begin;
    const auto again = [&]() noexcept {
      return parse_safetensors_header(written, header.bytes.size() + payload_bytes, "again");
    }();
    fuzz::check(again.user_metadata == metadata.user_metadata);
    fuzz::check(again.records.size() == tensors.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const TensorRecord& before = metadata.records[header.order[i]];
      const TensorRecord& after = again.records[i];
      fuzz::check(after.name == before.name && after.dtype == before.dtype && after.shape == before.shape);
      fuzz::check(after.size_bytes == before.size_bytes);
    }
  });
}
