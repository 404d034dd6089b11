// The same through LibTorch: every tensor of a file.
#include <cstdio>

#include "flashpack/torch.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  flashpack::Engine engine;
  std::size_t size_bytes = 0;
  for (const auto& [name, tensor] : flashpack::read_tensors(engine, argv[1]).tensors) size_bytes += tensor.nbytes();
  std::printf("loaded %zu bytes\n", size_bytes);
  return 0;
}
