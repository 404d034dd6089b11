/// Statuses and errors of the C API. flashpack.h includes this header, and has the rules: any thread may call.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/// FLASHPACK_OK, an errno of the system (positive), or one of the constants below (negative).
typedef int32_t flashpack_status;
enum {
  FLASHPACK_OK = 0,
  FLASHPACK_INVALID_ARGUMENT = -1,   ///< The call is wrong, whatever the files hold.
  FLASHPACK_BAD_FILE = -2,           ///< The file has no format that is known, or breaks a rule of its format.
  FLASHPACK_TRUNCATED = -3,          ///< The file ends before the requested bytes do.
  FLASHPACK_FILE_CHANGED = -4,       ///< The file is not the one that was opened, or changed while it was read.
  FLASHPACK_CANCELLED = -5,          ///< The transfer was cancelled.
  FLASHPACK_DEADLINE_EXCEEDED = -6,  ///< The timeout of the request passed first.
  FLASHPACK_UNUSABLE = -7,           ///< The engine, transfer, writer or events belong to this forked process's parent.
  FLASHPACK_CORRUPT = -9,            ///< Bytes of the file do not match their checksum.
  FLASHPACK_CUDA_ERROR = -10,        ///< CUDA failed; the message begins its cause with the name of a cudaError_t.
  FLASHPACK_INTERNAL_ERROR = -11,    ///< Something that this list does not foresee.
  FLASHPACK_RUNNING = -12,           ///< The transfer has not finished yet. This is no failure.
  FLASHPACK_NOT_FOUND = -13          ///< There is no tensor of that name, or no profile for that disk.
};

/// Describes a failed call. Constant, and owned by the caller.
typedef struct flashpack_error flashpack_error;

/// The status that the call has returned; FLASHPACK_OK for NULL.
flashpack_status flashpack_error_status(const flashpack_error* error);
/// Says what failed, where, and why: "read model.flashpack at 12288+4194304: Input/output error". Lives as long as the
/// error. Empty for NULL.
const char* flashpack_error_message(const flashpack_error* error);
/// The file that the call has failed on, or an empty string. Lives as long as the error.
const char* flashpack_error_path(const flashpack_error* error);
/// The offset in bytes in that file, or FLASHPACK_NO_OFFSET.
uint64_t flashpack_error_offset(const flashpack_error* error);
#define FLASHPACK_NO_OFFSET UINT64_MAX
/// Destroys the error. Its message and path are then invalid.
void flashpack_error_destroy(flashpack_error* error);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
