#include "torch_binding/libtorch/casts.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace flashpack {
namespace {

TEST(Casts, ATypeThatIsAskedForIsForTensorsOfItsKindThatAreNotQuantised) {
  EXPECT_EQ(type_when_asked(at::kFloat, at::kBFloat16), at::kBFloat16);
  EXPECT_EQ(type_when_asked(at::kDouble, at::ScalarType::Float8_e4m3fn), at::ScalarType::Float8_e4m3fn);
  EXPECT_EQ(type_when_asked(at::kComplexFloat, at::kComplexDouble), at::kComplexDouble);
  for (const auto own : {at::kLong, at::kInt, at::kByte, at::kBool, at::kComplexFloat, at::ScalarType::Float8_e5m2})
    EXPECT_EQ(type_when_asked(own, at::kHalf), own);
  EXPECT_EQ(type_when_asked(at::kFloat, at::kComplexFloat), at::kFloat);
  EXPECT_EQ(type_when_asked(at::kFloat, std::nullopt), at::kFloat);
}

TEST(Casts, ACastBetweenKindsIsMadeWhereNoValueChanges) {
  const auto same = [](const at::Tensor& tensor, at::ScalarType type) {
    const std::optional<at::Tensor> cast = cast_exactly(tensor, type);
    return cast && cast->scalar_type() == type;
  };
  EXPECT_TRUE(same(at::tensor({5.0, -3.0}), at::kLong));
  EXPECT_TRUE(same(at::full({1}, 255, at::kByte), at::kBFloat16));
  EXPECT_TRUE(same(at::full({1}, std::numeric_limits<std::int32_t>::max(), at::kLong), at::kInt));
  EXPECT_TRUE(same(at::full({1}, 2.0, at::kComplexFloat), at::kFloat));
  EXPECT_TRUE(same(at::full({1}, 2.0, at::kComplexFloat).to(at::kComplexHalf), at::kShort));
  EXPECT_TRUE(same(at::full({1}, 448.0, at::kFloat).to(at::ScalarType::Float8_e4m3fn), at::kShort));
}

TEST(Casts, ACastBetweenKindsIsNotMadeWhereAValueWouldChange) {
  EXPECT_FALSE(cast_exactly(at::tensor({0.5}), at::kLong));
  EXPECT_FALSE(cast_exactly(at::tensor({std::numeric_limits<double>::quiet_NaN()}), at::kLong));
  EXPECT_FALSE(cast_exactly(at::full({1}, -std::numeric_limits<double>::infinity(), at::kDouble), at::kLong));
  EXPECT_FALSE(cast_exactly(at::full({1}, std::numeric_limits<std::int64_t>::min(), at::kLong), at::kHalf));
  EXPECT_FALSE(cast_exactly(at::full({1}, 257, at::kLong), at::kBFloat16));
  EXPECT_FALSE(cast_exactly(at::full({1}, 200, at::kByte), at::kChar));
  EXPECT_FALSE(cast_exactly(at::full({1}, -1, at::kLong), at::ScalarType::UInt64));
  EXPECT_FALSE(cast_exactly(at::full({1}, 2, at::kLong), at::kBool));
  EXPECT_FALSE(cast_exactly(at::full({1}, c10::complex<float>(1, 2), at::kComplexFloat), at::kFloat));
}

TEST(Casts, AFloatPastTheGreatestIntegerIsNoIntegerOfThatType) {
  for (const auto type : {at::kByte, at::kChar, at::kShort, at::kInt, at::kLong}) {
    const int bits = 8 * static_cast<int>(c10::elementSize(type)) - (type == at::kByte ? 0 : 1);
    EXPECT_FALSE(cast_exactly(at::full({1}, std::ldexp(1.0, bits), at::kDouble), type));
    EXPECT_TRUE(cast_exactly(at::full({1}, std::ldexp(1.0, bits - 1), at::kDouble), type));
  }
  EXPECT_FALSE(cast_exactly(at::full({1}, std::numeric_limits<std::int32_t>::max(), at::kInt), at::kFloat));
  EXPECT_FALSE(cast_exactly(at::full({1}, std::numeric_limits<std::int64_t>::max(), at::kLong), at::kDouble));
  EXPECT_FALSE(cast_exactly(at::full({1}, std::numeric_limits<std::int64_t>::max(), at::kLong), at::kComplexDouble));
}

TEST(Casts, FloatingPointTensorsAreRoundedToEachOthersTypes) {
  const std::optional<at::Tensor> cast = cast_exactly(at::tensor({0.1}), at::kHalf);
  ASSERT_TRUE(cast);
  EXPECT_TRUE(at::equal(*cast, at::tensor({0.1}).to(at::kHalf)));
}

}  // namespace
}  // namespace flashpack
