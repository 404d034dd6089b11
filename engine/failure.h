/// The values of an Error, kept for a transfer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include "flashpack/error.h"

namespace flashpack::internal {

struct FileFailure;

/// The values of an Error, from which each wait() makes an Error of its own. An exception that several threads rethrow
/// is one object for all of them, which one thread could change while another reads it. Thread safety: const members
/// from any thread.
struct Failure {
  explicit Failure(const Error& error);
  /// Makes a Failure for the file at `path` from the exception that is being handled.
  static Failure of_exception(const char* operation, const std::filesystem::path& path);
  Error error() const;
  std::vector<FileError> file_errors() const;

  std::error_code code;
  std::string context;
  std::filesystem::path path;
  std::uint64_t offset_bytes;
  std::vector<FileFailure> files;  // For Error::files().
};

/// The values of a FileError.
struct FileFailure {
  std::size_t file;
  Failure failure;
};

}  // namespace flashpack::internal
