#include <string>

#include "engine/copier.h"
#include "engine/ground/error.h"
#include "engine/ground/immortal.h"

namespace flashpack {

namespace {

class CudaCategory final : public std::error_category {
 public:
  const char* name() const noexcept override { return "cuda"; }
  std::string message(int value) const override { return "cudaError_t " + std::to_string(value); }
};

}  // namespace

const std::error_category& cuda_category() noexcept { return internal::immortal<CudaCategory>(); }

namespace {
[[maybe_unused]] const std::error_category& cuda_category_made_at_once = cuda_category();  // As in error.cc.
}  // namespace

namespace internal {

std::unique_ptr<Copier> make_cuda_copier(std::span<const int>, std::span<const std::span<std::byte>>, Pool&, bool) {
  throw std::system_error(errno_code(ENOTSUP), "CUDA: this library was built without it");
}

int numa_node_of_cuda_device(int) noexcept { return -1; }

}  // namespace internal
}  // namespace flashpack
