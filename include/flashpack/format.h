/// Reads the metadata of checkpoints, and writes that of flashpack files. This needs neither torch nor an engine.
///
/// A flashpack file is [payload][JSON footer][u64 LE footer length][8 bytes magic], a safetensors file is
/// [u64 LE header length][JSON header][payload]; all integers are little-endian. Readers need only the records, which
/// say where each tensor lies; only the codec of flashpack files needs macroblocks.
///
/// read_metadata() reads a file, and parse_footer() and parse_safetensors_header() text that the caller has, as from a
/// checkpoint inside a container, whose place must then be added to the offsets of the records. A writer calls
/// file_order(), make_layout(), check_footer() and, after the payload, encode_footer(). The other functions say what
/// types and formats are called, and how large elements are.
///
/// Thread safety: any thread may call the functions, at the same time, too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
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
  kFloat4E2M1FNX2,  ///< Two 4-bit floats in a byte; a dim counts bytes.
};

std::uint32_t element_bytes(DType dtype) noexcept;
/// The name that torch gives the dtype, without "torch."; files have this name.
std::string_view dtype_name(DType dtype) noexcept;
/// Also accepts the aliases of torch ("half", "long", ...). Empty for names that the format does not have.
std::optional<DType> dtype_from_name(std::string_view name) noexcept;

struct TensorRecord {
  std::string name;  ///< Any UTF-8, unique in the file.
  DType dtype = DType::kFloat32;
  std::vector<std::int64_t> shape;  ///< Empty for a zero-dim tensor, which has one element.
  std::uint64_t offset_bytes = 0;   ///< In the file.
  std::uint64_t size_bytes = 0;
};

/// A stretch of the payload whose tensors all have one dtype.
struct Macroblock {
  DType dtype = DType::kFloat32;
  std::uint64_t offset_bytes = 0;  ///< In the file.
  std::uint64_t length_bytes = 0;  ///< length_elems * element_bytes(dtype).
  std::uint64_t length_elems = 0;
};

/// The fields of a footer that only the codec, and tools that show the footer, need.
struct Container {
  std::uint32_t version = 3;      ///< 3 for a file with one dtype, 4 for one with several.
  std::uint64_t align_bytes = 0;  ///< Each tensor begins at a multiple of it; 0 packs densely.
  std::uint64_t total_elems = 0;
  std::vector<Macroblock> macroblocks;
  std::vector<std::uint32_t> macroblock_of;  ///< For each record, the index of its macroblock.
};

enum class FileFormat : std::uint8_t { kFlashPack, kSafetensors };

/// "flashpack" or "safetensors".
std::string_view format_name(FileFormat format) noexcept;

/// All that a file says about its payload. If it comes from read_metadata(), parse_footer() or
/// parse_safetensors_header(), every range lies in the payload and no two tensors overlap.
struct Metadata {
  FileFormat format = FileFormat::kFlashPack;
  /// Where the payload ends: at the footer or, in a safetensors file, at the end of the file.
  std::uint64_t payload_bytes = 0;
  std::vector<TensorRecord> records;   ///< In file order.
  std::optional<Checksums> checksums;  ///< Checksums of the payload, if the file has them.
  /// Text that the file's author put in, as `__metadata__` of safetensors files: UTF-8, mostly empty.
  std::map<std::string, std::string> user_metadata;
  FileIdentity identity;              ///< Identity of the file that was read; to be passed as FileExtents::expected.
  std::vector<std::string> warnings;  ///< Harmless oddities, one sentence each.
  Container container;                ///< Without meaning for safetensors files.
};

/// A bound on the memory that a hostile file can ask for, and not tuned: 100,000 tensors have a footer of some 15 MB.
inline constexpr std::uint64_t kMaxFooterBytes = std::uint64_t{256} << 20;
/// The limit that safetensors itself has.
inline constexpr std::uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;

struct ReadMetadataOptions {
  std::uint64_t max_footer_bytes = kMaxFooterBytes;  ///< A longer footer or header is refused before it is read.
};

/// Reads and checks a flashpack file's footer or a safetensors file's header. A file that ends with the magic is a
/// flashpack file, whatever its name. This takes any bytes for possibly hostile, and allocates no more than the file's
/// size justifies. Throws: Error (kBadFile, whose message names the broken rule and the record, or what else the file
/// looks like; kFileChanged and kTruncated if it changes meanwhile; errno of the system).
Metadata read_metadata(const std::filesystem::path& path, const ReadMetadataOptions& options = {});

/// The same for a file that is open for reading as `fd`, which is borrowed; its position is neither used nor changed.
/// `path` is for messages only. If the load passes the same descriptor as FileExtents::fd, metadata and payload come
/// from one file, even if the file at `path` is replaced in between.
Metadata read_metadata(int fd, const std::filesystem::path& path, const ReadMetadataOptions& options = {});

/// The same for programs without exceptions: nothing is returned after an error, whose code is put into `error`; it is
/// empty after success.
std::optional<Metadata> read_metadata(const std::filesystem::path& path, const ReadMetadataOptions& options,
                                      std::error_code& error) noexcept;
std::optional<Metadata> read_metadata(int fd, const std::filesystem::path& path, const ReadMetadataOptions& options,
                                      std::error_code& error) noexcept;

/// Checks a footer's JSON against a payload of `payload_bytes`. `path` is for messages only. Throws: Error (kBadFile).
Metadata parse_footer(std::string_view json, std::uint64_t payload_bytes, const std::filesystem::path& path = {});

/// Checks the JSON of a safetensors header, with its padding, against a file of `file_bytes`. `path` is for messages
/// only. The rules are those of safetensors 0.9, and a name that stands twice is refused. Empty tensors that lie at one
/// place are in the header's order. Throws: Error (kBadFile), also for dtypes that torch lacks.
Metadata parse_safetensors_header(std::string_view json, std::uint64_t file_bytes,
                                  const std::filesystem::path& path = {});

/// A tensor to be written.
struct TensorSpec {
  std::string name;
  DType dtype = DType::kFloat32;
  std::vector<std::int64_t> shape;
};

/// Returns the order in which tensors are written, as indices into `tensors`: largest first, and those of equal size in
/// the order given. If `name_order` is set, it is the order instead: names without a tensor are skipped, and tensors
/// that it does not list are left out. Throws: Error (kInvalidArgument) for a duplicate name and for shapes that
/// make_layout() refuses.
std::vector<std::size_t> file_order(std::span<const TensorSpec> tensors,
                                    std::optional<std::span<const std::string>> name_order = std::nullopt);

/// The alignment that packers have by default, as the Python reference has.
inline constexpr std::uint64_t kDefaultAlignBytes = 128;

/// Gives every tensor its place in the file. Each dtype has one macroblock, in order of first appearance, and keeps its
/// tensors in the order given. Throws: Error (kInvalidArgument): "No tensors to pack", duplicate names, names that are
/// not UTF-8, negative dims, more than 64 dims, sizes past 2^63.
Metadata make_layout(std::span<const TensorSpec> tensors, std::uint64_t align_bytes);

/// To be called before a payload is written, so that a footer that cannot be written is an error in time. `checksums`
/// says whether the footer will have checksums. Throws: Error (kInvalidArgument) if encode_footer() would.
void check_footer(const Metadata& metadata, bool checksums);

/// Returns the bytes that follow the payload: the JSON, its length and the magic. Without checksums and user metadata
/// they are byte for byte what the Python reference writes. Checksums and user metadata add keys that other readers
/// skip: "metadata", an object of strings; "crc32c_per_mib", eight hexadecimal digits for each MiB of the payload; and,
/// as the last key, "footer_crc32c", which covers all of the JSON before its value. Requires: `metadata` comes from
/// make_layout(), read_metadata() or parse_footer(); checksums, if set, cover payload_bytes; user metadata may have
/// been changed. Throws: Error (kInvalidArgument) for the metadata of a safetensors file, for user metadata that is not
/// UTF-8, and for JSON longer than kMaxFooterBytes, which every reader refuses.
std::string encode_footer(const Metadata& metadata);

}  // namespace flashpack
