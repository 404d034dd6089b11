// Uses the engine alone: reads all bytes of a file.
#include <flashpack/engine.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <vector>

int main(int, char** arguments) {
  const std::filesystem::path path = arguments[1];
  std::vector<std::byte> bytes(std::filesystem::file_size(path));
  flashpack::Engine engine;
  const flashpack::TransferStats stats =
      engine.load({.files = {{.path = path, .extents = {{0, bytes.size(), bytes.data()}}}}});
  std::printf("loaded %ju bytes\n", static_cast<std::uintmax_t>(stats.requested_bytes));
}
