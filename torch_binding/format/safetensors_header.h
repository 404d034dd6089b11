/// The headers of safetensors files, and the names that dtypes and shapes have there.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "flashpack/format.h"

namespace flashpack {

/// "F32" for float32; empty if no safetensors file can have the dtype.
std::string_view safetensors_dtype(DType dtype) noexcept;

/// The shape as a header has it, which counts 4-bit floats, whereas torch counts pairs of them. Throws: Error
/// (kInvalidArgument) if a dim passes 2^63.
std::vector<std::int64_t> safetensors_shape(DType dtype, std::vector<std::int64_t> shape);

/// The beginning of a safetensors file, and what follows it.
struct SafetensorsHeader {
  std::string bytes;               ///< The length, and the JSON padded so that the payload is aligned.
  std::vector<std::size_t> order;  ///< The tensors in file order. Large elements come first, so that all are aligned.
};

/// Returns the header of a file with these tensors; without metadata it has no entry for that. Throws: Error
/// (kInvalidArgument) for what no such file can have.
SafetensorsHeader make_safetensors_header(std::span<const TensorSpec> tensors,
                                          const std::optional<std::map<std::string, std::string>>& user_metadata);

}  // namespace flashpack
