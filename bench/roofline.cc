// Measures with the least code how fast a file can be read into memory that has been touched, for comparisons beside
// programs in other languages: past the page cache, or through it by the better of pread and a copy from a mapping.
//
// usage: roofline cold|cached FILE
//
// The caller sees to it that the file is in the page cache or is not. Prints one line of JSON: `seconds`, `cpu_seconds`
// and `bytes`.
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string_view>

#include "bench/support/measure.h"
#include "bench/support/roofline.h"
#include "engine/ground/host_region.h"
#include "engine/ground/rounding.h"

namespace flashpack::bench {
namespace {

void print_roofline(bool cold, const std::filesystem::path& path) {
  const std::size_t size = std::filesystem::file_size(path);
  // Direct reads move whole blocks, so that the last one ends past the file.
  const internal::HostRegion memory(size + internal::kPageBytes, "the roofline");
  touch(memory.bytes());
  const auto target = memory.bytes().first(size);
  Sample sample = measure([&] { cold ? read_direct(path, target) : read_buffered(path, target); });
  if (!cold) {
    const Sample other = measure([&] { copy_mapped(path, target); });
    if (other.seconds < sample.seconds) sample = other;
  }
  std::printf(R"({"seconds": %.9f, "cpu_seconds": %.9f, "bytes": %zu})"
              "\n",
              sample.seconds, sample.cpu_seconds, size);
}

}  // namespace
}  // namespace flashpack::bench

int main(int argc, char** argv) try {
  const std::string_view state = argc == 3 ? argv[1] : "";
  if (state != "cold" && state != "cached") {
    std::fputs("usage: roofline cold|cached FILE\n", stderr);
    return 2;
  }
  flashpack::bench::print_roofline(state == "cold", argv[2]);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "roofline: %s\n", error.what());
  return 1;
}
