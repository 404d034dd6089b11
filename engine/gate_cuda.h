/// The gate of a CUDA device. Only *_cuda.cc include this.
#pragma once

#include <memory>

#include "engine/copier.h"
#include "engine/cuda_handles.h"

namespace flashpack::internal::cuda {

/// Implements Copier::gate(). Any thread.
std::unique_ptr<Gate> make_gate(const Context& context, cudaStream_t stream);

}  // namespace flashpack::internal::cuda
