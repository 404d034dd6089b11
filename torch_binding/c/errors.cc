#include "torch_binding/c/errors.h"

#include <cerrno>
#include <exception>
#include <string>
#include <system_error>

#include "engine/ground/error.h"
#include "engine/ground/immortal.h"
#include "flashpack/error.h"

struct flashpack_error {
  flashpack_status status = ENOMEM;
  std::string message = "out of memory";
  std::string path;
  std::uint64_t offset_bytes = FLASHPACK_NO_OFFSET;
};

namespace flashpack::c {

namespace {

static_assert(FLASHPACK_NO_OFFSET == Error::kNoOffset);
static_assert(FLASHPACK_INVALID_ARGUMENT == -static_cast<int>(Errc::kInvalidArgument));
static_assert(FLASHPACK_BAD_FILE == -static_cast<int>(Errc::kBadFile));
static_assert(FLASHPACK_TRUNCATED == -static_cast<int>(Errc::kTruncated));
static_assert(FLASHPACK_FILE_CHANGED == -static_cast<int>(Errc::kFileChanged));
static_assert(FLASHPACK_CANCELLED == -static_cast<int>(Errc::kCancelled));
static_assert(FLASHPACK_DEADLINE_EXCEEDED == -static_cast<int>(Errc::kDeadlineExceeded));
static_assert(FLASHPACK_UNUSABLE == -static_cast<int>(Errc::kUnusable));
static_assert(FLASHPACK_CORRUPT == -static_cast<int>(Errc::kCorrupt));

// For a failure that there is no memory to describe.
flashpack_error& out_of_memory() { return internal::immortal<flashpack_error>(); }

flashpack_status describe(flashpack_error** error, flashpack_error described) {
  const flashpack_status status = described.status;
  if (error) *error = new flashpack_error(std::move(described));
  return status;
}

// Requires: an exception is being handled.
flashpack_status describe_exception(flashpack_error** error) {
  try {
    throw;
  } catch (const Error& thrown) {
    return describe(error, {status_of(thrown.code()), thrown.what(), thrown.path(), thrown.offset_bytes()});
  } catch (const std::system_error& thrown) {
    return describe(error, {.status = status_of(thrown.code()), .message = thrown.what()});
  } catch (const NotFound& thrown) {
    return describe(error, {.status = FLASHPACK_NOT_FOUND, .message = thrown.what()});
  } catch (const std::exception& thrown) {
    if (internal::is_lack_of_memory(thrown)) return describe(error, {});
    return describe(error, {.status = FLASHPACK_INTERNAL_ERROR, .message = thrown.what()});
  } catch (...) {
    return describe(error, {.status = FLASHPACK_INTERNAL_ERROR, .message = "unknown error"});
  }
}

}  // namespace

flashpack_status status_of(const std::error_code& code) noexcept {
  if (!code) return FLASHPACK_OK;
  if (code.category() == flashpack_category()) return -code.value();
  if (code.category() == cuda_category()) return FLASHPACK_CUDA_ERROR;
  const bool of_system = code.category() == std::generic_category() || code.category() == std::system_category();
  return of_system && code.value() > 0 ? code.value() : FLASHPACK_INTERNAL_ERROR;
}

flashpack_status status_of_exception(flashpack_error** error) noexcept {
  try {
    return describe_exception(error);
  } catch (...) {
    if (error) *error = &out_of_memory();
    return ENOMEM;
  }
}

}  // namespace flashpack::c

flashpack_status flashpack_error_status(const flashpack_error* error) { return error ? error->status : FLASHPACK_OK; }

const char* flashpack_error_message(const flashpack_error* error) { return error ? error->message.c_str() : ""; }

const char* flashpack_error_path(const flashpack_error* error) { return error ? error->path.c_str() : ""; }

uint64_t flashpack_error_offset(const flashpack_error* error) {
  return error ? error->offset_bytes : FLASHPACK_NO_OFFSET;
}

void flashpack_error_destroy(flashpack_error* error) {
  if (error != &flashpack::c::out_of_memory()) delete error;
}
