#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "tests/fuzz/checks.h"
#include "torch_binding/format/format_rules.h"
#include "torch_binding/format/index.h"

using namespace flashpack;

namespace {

std::string written(const WeightMap& map) {
  std::string text = R"({"weight_map":{)";
  for (const auto& [tensor, file] : map) {
    if (text.back() != '{') text += ',';
    rules::append_json_string(text, tensor);
    text += ':';
    rules::append_json_string(text, file);
  }
  return text + "}}";
}

}  // namespace

/// `data` is the text of an index.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size_bytes) {
  return fuzz::run(data, size_bytes, [](std::string_view text) {
    const WeightMap map = parse_index(text, "fuzz");
    fuzz::check(!map.empty());
    // No file may be outside the directory of the index.
    for (const auto& [tensor, file] : map) {
      fuzz::check(!file.empty() && file.find('/') == file.npos && file.find('\0') == file.npos);
      fuzz::check(file != "." && file != "..");
    }
    // The names are as they were written: anything thrown here is a finding.
    const auto again = [&]() noexcept { return parse_index(written(map), "again"); }();
    fuzz::check(again == map);
  });
}
