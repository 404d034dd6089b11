/// What tensors become when a type is asked for, and casts that must not lose anything.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace flashpack {

/// What a tensor of `own` becomes when `asked` is asked for all: floating-point tensors take a floating-point type,
/// complex ones a complex type. Everything else keeps its own, 8-bit floats included: counters would be rounded, and
/// packed or quantised weights are not the numbers that they look like.
at::ScalarType type_when_asked(at::ScalarType own, std::optional<at::ScalarType> asked) noexcept;

/// `tensor` as `type`. Empty where a value would change and either of them is of integers, or only one is complex.
std::optional<at::Tensor> cast_exactly(const at::Tensor& tensor, at::ScalarType type);

}  // namespace flashpack
