/// Turns exceptions into the statuses and error objects of the C API.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <stdexcept>
#include <system_error>
#include <type_traits>

#include "flashpack/flashpack.h"

namespace flashpack::c {

/// Becomes FLASHPACK_NOT_FOUND.
struct NotFound : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The status of the C API for `code`.
flashpack_status status_of(const std::error_code& code) noexcept;

/// Returns the status of the exception that is being handled, and sets `*error`, unless `error` is null, to an object
/// that describes it.
flashpack_status status_of_exception(flashpack_error** error) noexcept;

/// Runs `body`, which returns a status or nothing, for FLASHPACK_OK. No exception comes out of it.
template <typename Body>
flashpack_status guarded(flashpack_error** error, Body body) noexcept {
  if (error) *error = nullptr;
  try {
    if constexpr (std::is_void_v<decltype(body())>) {
      body();
      return FLASHPACK_OK;
    } else {
      return body();
    }
  } catch (...) {
    return status_of_exception(error);
  }
}

}  // namespace flashpack::c
