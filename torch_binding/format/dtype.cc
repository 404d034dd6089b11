#include <array>
#include <utility>

#include "flashpack/format.h"

namespace flashpack {

namespace {

struct DTypeInfo {
  std::string_view name;
  std::uint32_t element_bytes;
};

// Indexed by DType.
constexpr std::array kDTypes = {DTypeInfo{"bool", 1},           DTypeInfo{"int8", 1},
                                DTypeInfo{"uint8", 1},          DTypeInfo{"int16", 2},
                                DTypeInfo{"uint16", 2},         DTypeInfo{"int32", 4},
                                DTypeInfo{"uint32", 4},         DTypeInfo{"int64", 8},
                                DTypeInfo{"uint64", 8},         DTypeInfo{"float16", 2},
                                DTypeInfo{"bfloat16", 2},       DTypeInfo{"float32", 4},
                                DTypeInfo{"float64", 8},        DTypeInfo{"complex32", 4},
                                DTypeInfo{"complex64", 8},      DTypeInfo{"complex128", 16},
                                DTypeInfo{"float8_e4m3fn", 1},  DTypeInfo{"float8_e4m3fnuz", 1},
                                DTypeInfo{"float8_e5m2", 1},    DTypeInfo{"float8_e5m2fnuz", 1},
                                DTypeInfo{"float8_e8m0fnu", 1}, DTypeInfo{"float4_e2m1fn_x2", 1}};
static_assert(kDTypes.size() == static_cast<std::size_t>(DType::kFloat4E2M1FNX2) + 1);

// Other names that torch has for the same dtypes. A reader may meet them; a writer never writes them.
constexpr std::array<std::pair<std::string_view, DType>, 9> kAliases = {{{"float", DType::kFloat32},
                                                                         {"double", DType::kFloat64},
                                                                         {"half", DType::kFloat16},
                                                                         {"short", DType::kInt16},
                                                                         {"int", DType::kInt32},
                                                                         {"long", DType::kInt64},
                                                                         {"cfloat", DType::kComplex64},
                                                                         {"cdouble", DType::kComplex128},
                                                                         {"chalf", DType::kComplex32}}};

const DTypeInfo& info(DType dtype) noexcept { return kDTypes[static_cast<std::size_t>(dtype)]; }

}  // namespace

std::uint32_t element_bytes(DType dtype) noexcept { return info(dtype).element_bytes; }

std::string_view dtype_name(DType dtype) noexcept { return info(dtype).name; }

std::optional<DType> dtype_from_name(std::string_view name) noexcept {
  for (std::size_t i = 0; i < kDTypes.size(); ++i) {
    if (kDTypes[i].name == name) return static_cast<DType>(i);
  }
  for (const auto& [alias, dtype] : kAliases) {
    if (alias == name) return dtype;
  }
  return std::nullopt;
}

}  // namespace flashpack
