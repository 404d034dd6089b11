/// The flashpack container: its metadata, read and written. No torch, no engine needed to read metadata.
///
/// A file is [payload][JSON footer][u64 LE footer length][8 bytes magic]; all integers are little-endian. Readers need
/// the records alone, which say where each tensor lies; macroblocks matter to the codec, which keeps them apart.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "flashpack/checksums.h"
#include "flashpack/error.h"
#include "flashpack/file_identity.h"

namespace flashpack {

enum class DType : std::uint8_t {
  kBool,
  kInt8,
  kUInt8,
  kInt16,
  kUInt16,
  kInt32,
  kUInt32,
  kInt64,
  kUInt64,
  kFloat16,
  kBFloat16,
  kFloat32,
  kFloat64,
  kComplex32,
  kComplex64,
  kComplex128,
  kFloat8E4M3FN,
  kFloat8E4M3FNUZ,
  kFloat8E5M2,
  kFloat8E5M2FNUZ,
  kFloat8E8M0FNU,
};

std::uint32_t element_bytes(DType dtype) noexcept;
/// torch's name without "torch.", as written to files.
std::string_view dtype_name(DType dtype) noexcept;
/// Also takes torch's aliases ("half", "long", ...). Empty for names outside the format.
std::optional<DType> dtype_from_name(std::string_view name) noexcept;

struct TensorRecord {
  std::string name;  ///< Any UTF-8, unique in the file.
  DType dtype = DType::kFloat32;
  std::vector<std::int64_t> shape;  ///< Empty for a zero-dim tensor, which has one element.
  std::uint64_t offset_bytes = 0;   ///< In the file.
  std::uint64_t size_bytes = 0;
};

/// Tensors of one dtype that follow each other.
struct Macroblock {
  DType dtype = DType::kFloat32;
  std::uint64_t offset_bytes = 0;  ///< In the file.
  std::uint64_t length_bytes = 0;  ///< length_elems * element_bytes(dtype).
  std::uint64_t length_elems = 0;
};

/// How the footer of a flashpack file describes its records: what it takes to write that footer, or to show it.
struct Container {
  std::uint32_t version = 3;      ///< 3: one dtype. 4: several.
  std::uint64_t align_bytes = 0;  ///< 0: dense.
  std::uint64_t total_elems = 0;
  std::vector<Macroblock> macroblocks;
  std::vector<std::uint32_t> macroblock_of;  ///< By record: the index of the macroblock that it lies in.
};

/// All of a file but its payload. From read_metadata() it is valid: every range lies in the payload, nothing overlaps.
struct Metadata {
  std::uint64_t payload_bytes = 0;     ///< Length of the payload; the footer begins there.
  std::vector<TensorRecord> records;   ///< In file order.
  std::optional<Checksums> checksums;  ///< Of the payload, when the file has them.
  /// Notes of whoever packed the file, as in `__metadata__` of safetensors files: UTF-8, mostly empty.
  std::map<std::string, std::string> user_metadata;
  FileIdentity identity;              ///< Of the file it was read from; pass it on as FileExtents::expected.
  std::vector<std::string> warnings;  ///< Harmless oddities, one sentence each.
  Container container;
};

inline constexpr std::uint64_t kMaxFooterBytes = std::uint64_t{256} << 20;

struct ReadMetadataOptions {
  std::uint64_t max_footer_bytes = kMaxFooterBytes;  ///< A longer footer is refused before it is read.
};

/// Reads and checks a file's footer; trusts nothing in it, and allocates no more than the file's size justifies.
/// Throws: Error; Errc::kBadFile names the rule that was broken and the record, errno what the system said.
Metadata read_metadata(const std::filesystem::path& path, const ReadMetadataOptions& options = {});

/// The same for a file that is open for reading as `fd`, which is borrowed; its position neither matters nor changes.
/// `path` is for messages only. With FileExtents::fd, a file that is replaced between footer and payload does not
/// matter: both are of the one that was opened.
Metadata read_metadata(int fd, const std::filesystem::path& path, const ReadMetadataOptions& options = {});

/// Checks a footer's JSON against a payload of `payload_bytes`. `path` is for messages only. Throws: Error (kBadFile).
Metadata parse_footer(std::string_view json, std::uint64_t payload_bytes, const std::filesystem::path& path = {});

/// A tensor to be written.
struct TensorSpec {
  std::string name;
  DType dtype = DType::kFloat32;
  std::vector<std::int64_t> shape;
};

/// The order tensors are written in, as indices into `tensors`: largest first, ties as given; or `name_order`, where
/// names that do not exist are passed over and tensors that it does not list are left out.
/// Throws: Error (kInvalidArgument) for a name that stands twice and for shapes that make_layout() refuses.
std::vector<std::size_t> file_order(std::span<const TensorSpec> tensors,
                                    std::optional<std::span<const std::string>> name_order = std::nullopt);

/// Places `tensors`, in the order given, one macroblock per dtype in order of first appearance.
/// Throws: Error (kInvalidArgument): "No tensors to pack", "Nothing to pack after alignment", names twice, names that
/// are not UTF-8, negative dims, more than 64 dims, sizes past 2^63.
Metadata make_layout(std::span<const TensorSpec> tensors, std::uint64_t align_bytes);

/// Throws: Error (kInvalidArgument) where encode_footer() would refuse `metadata`, with checksums of its payload if
/// `checksums`: to be asked before a payload is written.
void check_footer(const Metadata& metadata, bool checksums);

/// The bytes after the payload: JSON, its length, the magic. Without checksums and user metadata, byte for byte what
/// the Python reference writes. They are further keys of the JSON, which other readers pass over: "metadata", an object
/// of strings; "crc32c_per_mib", eight hexadecimal digits for each MiB of the payload; and as the very last
/// "footer_crc32c", over all of the JSON before its value.
/// `metadata` is one that make_layout(), read_metadata() or parse_footer() returned, its checksums are of payload_bytes
/// bytes, and its user metadata may be set. Throws: Error (kInvalidArgument) for user metadata that is not UTF-8, and
/// for JSON longer than kMaxFooterBytes, which no reader takes.
std::string encode_footer(const Metadata& metadata);

}  // namespace flashpack
