// What somebody else's program does first: link the engine, the format and the profiles, and read their errors.
#include <cstdio>
#include <vector>

#include "flashpack/engine.h"
#include "flashpack/format.h"
#include "flashpack/tuning.h"

int main(int argc, char** argv) {
  const char* path = argc > 1 ? argv[1] : "no-such.flashpack";
  try {
    flashpack::Engine engine(flashpack::tuned_options(path).options);
    const auto metadata = flashpack::read_metadata(path);
    std::vector<std::byte> payload(metadata.payload_bytes);
    engine.load({.files = {{.path = path,
                            .extents = {{.size_bytes = payload.size(), .target = payload.data()}},
                            .expected = metadata.identity}}});
    std::printf("loaded %zu bytes, %zu tensors\n", payload.size(), metadata.records.size());
    return 0;
  } catch (const flashpack::Error& error) {
    std::printf("%s\n", error.what());
    return error.code() == std::errc::no_such_file_or_directory ? 2 : 1;
  }
}
