#include "engine/failure.h"

#include <cerrno>
#include <exception>

#include "engine/ground/error.h"

namespace flashpack::internal {

Failure::Failure(const Error& error)
    : code(error.code()), context(error.context_), path(error.path()), offset_bytes(error.offset_bytes()) {}

Error Failure::error() const {
  if (files.empty()) return Error(code, context, path, offset_bytes);
  return Error(code, context, path, offset_bytes, file_errors());
}

std::vector<FileError> Failure::file_errors() const {
  std::vector<FileError> errors;
  errors.reserve(files.size());
  for (const FileFailure& each : files) errors.push_back({each.file, each.failure.error()});
  return errors;
}

Failure Failure::of_exception(const char* operation, const std::filesystem::path& path) {
  try {
    throw;
  } catch (const Error& error) {
    return Failure(error);
  } catch (const std::system_error& error) {
    return Failure(file_error(error.code(), operation, path));
  } catch (const std::exception& error) {
    if (is_lack_of_memory(error)) return Failure(file_error(errno_code(ENOMEM), operation, path));
    // A fault of this library.
    const std::string context = std::string(operation) + " " + path.string() + ": " + error.what();
    return Failure(Error(errno_code(ENOTRECOVERABLE), context, path));
  }
}

}  // namespace flashpack::internal
