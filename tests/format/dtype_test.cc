#include <gtest/gtest.h>

#include "flashpack/format.h"

namespace flashpack {
namespace {

TEST(DType, NamesRoundTripForEveryDType) {
  for (int i = 0; i <= static_cast<int>(DType::kFloat4E2M1FNX2); ++i) {
    const auto dtype = static_cast<DType>(i);
    EXPECT_EQ(dtype_from_name(dtype_name(dtype)), dtype);
  }
}

TEST(DType, TorchAliasesAreRead) {
  EXPECT_EQ(dtype_from_name("half"), DType::kFloat16);
  EXPECT_EQ(dtype_from_name("long"), DType::kInt64);
}

TEST(DType, OtherNamesAreRefused) {
  EXPECT_EQ(dtype_from_name("float4_e2m1fn"), std::nullopt);
  EXPECT_EQ(dtype_from_name(""), std::nullopt);
}

}  // namespace
}  // namespace flashpack
