/// The one exception type of the C++ API and the failures that are not an errno. Thread safety: any thread may call the
/// functions, and read an Error; copies of one may be used by several threads at the same time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <vector>

namespace flashpack {

/// Failures that the library finds itself. Errors of the operating system keep their errno (`std::generic_category`),
/// so `error.code() == std::errc::no_such_file_or_directory` and `error.code() == Errc::kTruncated` both work. Where a
/// value below names a std::errc, it compares equal to that, too.
enum class Errc {
  kInvalidArgument = 1,  ///< The request is wrong whatever the file holds: bad option, overlapping targets, null
                         ///< target. Equal to std::errc::invalid_argument.
  kBadFile,              ///< The file has no format that is known, or breaks a rule of its format.
  kTruncated,            ///< The file ends before the requested bytes do: a short read.
  kFileChanged,          ///< The file is not the one the caller's metadata came from, or changed while it was read.
  kCancelled,  ///< Transfer::cancel() was called, or the handle was destroyed. Equal to std::errc::operation_canceled.
  kDeadlineExceeded,  ///< The request's deadline passed first. Equal to std::errc::timed_out.
  kUnusable,          ///< The engine, transfer, writer or event queue belongs to the parent of this forked process.
  kMismatch,          ///< The file is valid, but its names, shapes or dtypes do not fit the module.
  kCorrupt,           ///< Bytes of the file do not match their checksum.
};

const std::error_category& flashpack_category() noexcept;
/// Failures of the CUDA runtime. The values are those of cudaError_t, and each message begins with the value's name.
const std::error_category& cuda_category() noexcept;
inline std::error_code make_error_code(Errc e) noexcept { return {static_cast<int>(e), flashpack_category()}; }

struct FileError;
namespace internal {
struct Failure;
}

/// Thrown by every function of the library that says "Throws: Error".
///
/// what() reads "<operation> <path> at <offset>+<length>: <cause>", for example
/// "read model.flashpack at 12288+4194304: Input/output error". If files() is not empty, the request had several files,
/// and no cancel, deadline or error of CUDA has ended all of them, "N of M files failed: " comes before.
class Error : public std::system_error {
 public:
  static constexpr std::uint64_t kNoOffset = ~std::uint64_t{0};

  /// `context` is the text of what() before the cause; the text of the cause comes from `code`.
  Error(std::error_code code, const std::string& context, std::filesystem::path path = {},
        std::uint64_t offset_bytes = kNoOffset);
  /// The same, with the errors of single files.
  Error(std::error_code code, const std::string& context, std::filesystem::path path, std::uint64_t offset_bytes,
        std::vector<FileError> files);

  /// The file that the operation failed on; empty when the failure concerns no single file.
  const std::filesystem::path& path() const noexcept { return path_; }
  /// File offset of the failed operation in bytes, or kNoOffset.
  std::uint64_t offset_bytes() const noexcept { return offset_bytes_; }
  /// After a load with LoadRequest::continue_on_error: each file that has not landed whole, in the order of the
  /// request. Empty for other errors. Lives as long as any copy of the error.
  std::span<const FileError> files() const noexcept;

 private:
  friend struct internal::Failure;
  std::string context_;
  std::filesystem::path path_;
  std::uint64_t offset_bytes_;
  std::shared_ptr<const std::vector<FileError>> files_;  // Shared by the copies. Null if there are none.
};

/// The error of one file of a load.
struct FileError {
  std::size_t file = 0;  ///< Index in LoadRequest::files.
  Error error;
};

inline std::span<const FileError> Error::files() const noexcept {
  return files_ ? std::span<const FileError>(*files_) : std::span<const FileError>();
}

}  // namespace flashpack

template <>
struct std::is_error_code_enum<flashpack::Errc> : std::true_type {};
