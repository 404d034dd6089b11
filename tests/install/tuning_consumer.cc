// Uses the engine with the options that are kept for a disk, and reads all bytes of a file without the format.
#include <flashpack/engine.h>
#include <flashpack/tuning.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <vector>

int main(int, char** arguments) {
  const std::filesystem::path path = arguments[1];
  std::vector<std::byte> bytes(std::filesystem::file_size(path));
  flashpack::Engine engine(flashpack::tuned_options(path).options);
  const flashpack::TransferStats stats =
      engine.load({.files = {{.path = path, .extents = {{0, bytes.size(), bytes.data()}}}}});
  std::printf("loaded %ju bytes\n", static_cast<std::uintmax_t>(stats.requested_bytes));
}
