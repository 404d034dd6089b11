/// Chooses the dtype of tensors when one is asked for, and casts without loss.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace flashpack {

/// Returns the dtype that a tensor of dtype `own` gets when `asked` is asked for all tensors: floating-point tensors
/// take a floating-point type, complex ones a complex type. All others, 8-bit floats included, keep their own, because
/// a cast would round counters and spoil packed or quantised weights.
at::ScalarType type_when_asked(at::ScalarType own, std::optional<at::ScalarType> asked) noexcept;

/// Returns `tensor` as `type`. Empty if a value would change and one of the types is an integer, or only one is
/// complex.
std::optional<at::Tensor> cast_exactly(const at::Tensor& tensor, at::ScalarType type);

}  // namespace flashpack
