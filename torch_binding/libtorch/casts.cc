#include "torch_binding/libtorch/casts.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/real.h>

#include <cmath>

namespace flashpack {

namespace {

bool is_plain_float(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 || type == at::kFloat || type == at::kDouble;
}

bool is_integral(at::ScalarType type) { return c10::isIntegralType(type, /*includeBool=*/true); }

bool is_same_kind(at::ScalarType a, at::ScalarType b) {
  return (c10::isFloatingType(a) && c10::isFloatingType(b)) || (c10::isComplexType(a) && c10::isComplexType(b));
}

// torch cannot compare 8-bit floats and complex32.
at::Tensor comparable(const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  if (type == at::kComplexHalf) return tensor.to(at::kComplexFloat);
  return c10::isFloatingType(type) && !is_plain_float(type) ? tensor.to(at::kFloat) : tensor;
}

at::Tensor real_of(const at::Tensor& tensor) {
  return c10::isComplexType(tensor.scalar_type()) ? at::real(tensor) : tensor;
}

// Torch warns when it drops an imaginary part, whether that is zero or not.
at::Tensor cast_to(const at::Tensor& tensor, at::ScalarType type) {
  return (c10::isComplexType(type) ? tensor : real_of(tensor)).to(type);
}

// Whether all are finite and less than the greatest value of `type` plus 1, which no cast rounds down.
bool is_in_range(const at::Tensor& numbers, at::ScalarType type) {
  const int bits = type == at::kBool ? 1 : 8 * static_cast<int>(c10::elementSize(type)) - c10::isSignedType(type);
  const at::Tensor real = comparable(real_of(numbers));
  return at::isfinite(real).logical_and_(real.lt(std::ldexp(1.0, bits))).all().item<bool>();
}

bool is_equal(const at::Tensor& tensor, const at::Tensor& cast) {
  const at::ScalarType type = tensor.scalar_type();
  if (!is_integral(type) || !is_integral(cast.scalar_type())) {
    // GPUs and Arm CPUs cast what is past the end of an integral type to its greatest value, and others cast infinity
    // to its least one. A cast back would give the old value, though it is another number.
    if (is_integral(type) && !is_in_range(cast, type)) return false;
    if (is_integral(cast.scalar_type()) && !is_in_range(tensor, cast.scalar_type())) return false;
    return at::equal(comparable(cast_to(cast, type)), comparable(tensor));
  }
  // Both are compared as 64-bit integers, because a value that wrapped around would wrap back in a cast to its own
  // type.
  const at::Tensor wide = tensor.to(at::kLong);
  const bool has_u64 = type == at::ScalarType::UInt64 || cast.scalar_type() == at::ScalarType::UInt64;
  return at::equal(wide, cast.to(at::kLong)) && !(has_u64 && wide.lt(0).any().item<bool>());
}

}  // namespace

at::ScalarType type_when_asked(at::ScalarType own, std::optional<at::ScalarType> asked) noexcept {
  if (!asked) return own;
  const bool takes =
      (is_plain_float(own) && c10::isFloatingType(*asked)) || (c10::isComplexType(own) && c10::isComplexType(*asked));
  return takes ? *asked : own;
}

std::optional<at::Tensor> cast_exactly(const at::Tensor& tensor, at::ScalarType type) {
  const at::ScalarType own = tensor.scalar_type();
  const at::Tensor cast = cast_to(tensor, type);
  if (own != type && !is_same_kind(own, type) && !is_equal(tensor, cast)) return std::nullopt;
  return cast;
}

}  // namespace flashpack
