/// How the libraries make their Errors: "<operation> <path> at <offset>+<length>: <cause>". The functions called
/// *_error make one, and catching() and value_or_code() turn one into a code.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <cstdint>
#include <exception>
#include <filesystem>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

#include "flashpack/error.h"

namespace flashpack::internal {

inline std::error_code errno_code(int error_number) noexcept { return {error_number, std::generic_category()}; }

/// An Error about a whole file.
inline Error file_error(std::error_code code, const char* operation, const std::filesystem::path& path) {
  return Error(code, (std::string(operation) += ' ') += path.string(), path);
}

/// An Error about a range of a file.
inline Error range_error(std::error_code code, const char* operation, const std::filesystem::path& path,
                         std::uint64_t offset_bytes, std::uint64_t size_bytes) {
  std::string context = operation;
  context.append(" ").append(path.string()).append(" at ").append(std::to_string(offset_bytes));
  context.append("+").append(std::to_string(size_bytes));
  return Error(code, context, path, offset_bytes);
}

/// Makes an Error of `operation` from `error`; what() names the cause only once.
inline Error operation_error(const char* operation, const std::system_error& error) {
  const std::string cause = error.code().message();
  std::string what = error.what();
  if (what.ends_with(cause)) what.resize(what.size() - cause.size());
  if (what.ends_with(": ")) what.resize(what.size() - 2);
  return Error(error.code(), what.empty() ? operation : std::string(operation) + ": " + what);
}

/// Whether the exception says that there is not enough memory: std::bad_alloc, or the std::length_error of a size that
/// no memory has.
inline bool is_lack_of_memory(const std::exception& error) noexcept {
  return dynamic_cast<const std::bad_alloc*>(&error) || dynamic_cast<const std::length_error*>(&error);
}

/// Runs `body`, which may throw an Error or run out of memory. `error` gets the code of either, or is empty.
template <typename Body>
void catching(std::error_code& error, Body body) noexcept {
  error.clear();
  try {
    body();
  } catch (const std::system_error& thrown) {
    error = thrown.code();
  } catch (const std::exception&) {  // A lack of memory: see above.
    error = std::make_error_code(std::errc::not_enough_memory);
  }
}

/// Does the same with a `body` that returns a value. Returns that, or an empty Result beside a code.
template <typename Result, typename Body>
Result value_or_code(std::error_code& error, Body body) noexcept {
  Result result{};
  catching(error, [&] { result = body(); });
  return result;
}

/// An Error about an argument that concerns no file.
inline Error argument_error(const std::string& what) { return Error(Errc::kInvalidArgument, what); }

/// An Error about an argument of an operation on a file: "<operation> <path>: <what>: invalid argument".
inline Error argument_error(const char* operation, const std::filesystem::path& path, const std::string& what) {
  return Error(Errc::kInvalidArgument, std::string(operation) + " " + path.string() + ": " + what, path);
}

}  // namespace flashpack::internal
