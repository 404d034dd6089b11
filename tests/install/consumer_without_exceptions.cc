// A program that is built without exceptions.
#include <cstdio>
#include <vector>

#include "flashpack/checkpoint.h"
#include "flashpack/engine.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  std::error_code error;
  auto engine = flashpack::Engine::make({}, error);
  if (!engine) {
    std::printf("%s\n", error.message().c_str());
    return 1;
  }
  const auto checkpoint = flashpack::open_checkpoint(argv[1], error);
  if (!checkpoint || checkpoint->size() == 0) return 1;
  std::vector<std::byte> start(8);
  flashpack::LoadRequest request{
      .files = {{.path = argv[1], .extents = {{.size_bytes = start.size(), .target = start.data()}}}}};
  flashpack::Transfer transfer = engine->start_load(std::move(request), nullptr, error);
  if (!transfer.valid() || !transfer.wait_for(std::chrono::minutes(1))) return 1;
  std::printf("%s\n", transfer.error() ? transfer.error_text().c_str() : "loaded 8 bytes");
  return transfer.error() ? 1 : 0;
}
