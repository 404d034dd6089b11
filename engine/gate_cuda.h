/// A gate opens when a caller's stream has done what comes before a transfer. For *_cuda.cc alone.
#pragma once

#include <memory>

#include "engine/copier.h"
#include "engine/cuda_handles.h"

namespace flashpack::internal::cuda {

/// As Copier::gate().
std::unique_ptr<Gate> make_gate(const Context& context, cudaStream_t stream);

}  // namespace flashpack::internal::cuda
