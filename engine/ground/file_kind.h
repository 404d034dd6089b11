/// Names the kind of a file in messages.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <sys/stat.h>

#include <string>

namespace flashpack::internal {

/// Why an operation that needs a regular file cannot use a file of this mode: "<operation> (a FIFO, not a regular
/// file)".
inline std::string refusal_of(const char* operation, mode_t mode) {
  const char* kind = "of an unknown kind";
  if (S_ISDIR(mode)) kind = "a directory";
  if (S_ISFIFO(mode)) kind = "a FIFO or pipe";
  if (S_ISSOCK(mode)) kind = "a socket";
  if (S_ISCHR(mode)) kind = "a character device";
  if (S_ISBLK(mode)) kind = "a block device";
  return std::string(operation) + " (" + kind + ", not a regular file)";
}

}  // namespace flashpack::internal
