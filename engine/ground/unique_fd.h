/// Ownership of file descriptors in the engine.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <cerrno>
#include <filesystem>

#include "engine/ground/error.h"
#include "flashpack/file_identity.h"
#include "flashpack/unique_fd.h"

namespace flashpack::internal {

using flashpack::UniqueFd;

/// Opens the file at `path` with open_to_read(). Throws: Error (errno of open).
inline UniqueFd open_file(const std::filesystem::path& path) {
  UniqueFd fd(open_to_read(path));
  if (!fd) throw file_error(errno_code(errno), "open", path);
  return fd;
}

}  // namespace flashpack::internal
