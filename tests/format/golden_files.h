/// The golden files and what is in them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <ostream>
#include <string>
#include <vector>

#include "flashpack/format.h"

namespace flashpack::test {

struct GoldenTensor {
  std::string name;
  DType dtype;
  std::vector<std::int64_t> shape;
  std::uint64_t offset_bytes;  ///< In the file.
};

struct GoldenFile {
  std::string name;
  std::uint64_t align_bytes;
  std::vector<GoldenTensor> tensors;  ///< In file order.

  std::filesystem::path path() const { return std::filesystem::path(FLASHPACK_GOLDEN_DIR) / (name + ".flashpack"); }
};

inline void PrintTo(const GoldenFile& file, std::ostream* out) { *out << file.name; }

inline const std::vector<GoldenFile> kGoldenFiles = {
    {"v3_all_u8_align1",
     1,
     {
         {"x", DType::kUInt8, {5}, 0},
         {"y", DType::kUInt8, {3}, 5},
     }},
    {"v3_bf16",
     128,
     {
         {"w", DType::kBFloat16, {2, 2}, 0},
         {"b", DType::kBFloat16, {1}, 128},
     }},
    {"v3_bool",
     128,
     {
         {"m", DType::kBool, {3}, 0},
     }},
    {"v3_f32_align128",
     128,
     {
         {"w", DType::kFloat32, {2, 2}, 0},
         {"b", DType::kFloat32, {2}, 128},
         {"s", DType::kFloat32, {}, 256},
     }},
    {"v3_fp8",
     128,
     {
         {"w", DType::kFloat8E4M3FN, {4}, 0},
     }},
    {"v3_name_escapes",
     0,
     {
         {"q\"\\/\n\t\u0001é漢😀", DType::kFloat32, {1}, 0},
     }},
    {"v3_name_order",
     0,
     {
         {"c", DType::kFloat32, {2}, 0},
         {"a", DType::kFloat32, {1}, 8},
     }},
    {"v3_target_f16",
     4,
     {
         {"f", DType::kFloat16, {2}, 0},
         {"i", DType::kFloat16, {1}, 4},
     }},
    {"v3_ties_align0",
     0,
     {
         {"c", DType::kFloat32, {2}, 0},
         {"a", DType::kFloat32, {2}, 8},
         {"b", DType::kFloat32, {2}, 16},
     }},
    {"v3_trailing_empty",
     64,
     {
         {"a", DType::kFloat32, {3}, 0},
         {"e", DType::kFloat32, {0, 2}, 64},
     }},
    {"v4_align0_unaligned_block",
     0,
     {
         {"i8", DType::kInt8, {5}, 0},
         {"d", DType::kFloat64, {2}, 8},
     }},
    {"v4_bf16_f32_i64",
     128,
     {
         {"w", DType::kBFloat16, {2, 3}, 0},
         {"ids", DType::kInt64, {1, 3}, 128},
         {"t", DType::kInt64, {}, 256},
         {"norm", DType::kFloat32, {2}, 384},
     }},
    {"v4_c128_align24",
     24,
     {
         {"f", DType::kFloat32, {3}, 0},
         {"g", DType::kFloat32, {1}, 24},
         {"c", DType::kComplex128, {2}, 48},
     }},
    {"v4_empty_block",
     16,
     {
         {"f", DType::kFloat32, {2}, 0},
         {"e", DType::kInt64, {0}, 16},
     }},
    {"v4_mixed_align16",
     16,
     {
         {"h", DType::kFloat16, {4}, 0},
         {"i8", DType::kInt8, {3}, 16},
         {"f", DType::kFloat32, {2}, 32},
         {"i64", DType::kInt64, {}, 48},
     }},
};

inline const std::vector<GoldenFile>& golden_files() { return kGoldenFiles; }

inline std::string file_bytes(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

}  // namespace flashpack::test
