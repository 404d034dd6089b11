/// What a caller's stream has to do before the engine may touch memory of the caller's. For *_cuda.cc alone.
#pragma once

#include <memory>

#include "engine/copier.h"
#include "engine/cuda_handles.h"

namespace flashpack::internal::cuda {

/// As Copier::gate().
std::unique_ptr<Gate> make_gate(const Context& context, cudaStream_t stream);

}  // namespace flashpack::internal::cuda
