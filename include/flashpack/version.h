/// The version of the library, for C and C++.
#pragma once

#define FLASHPACK_VERSION_MAJOR 1
#define FLASHPACK_VERSION_MINOR 0
#define FLASHPACK_VERSION_PATCH 0
/// The version as one number that grows, for `#if FLASHPACK_VERSION_NUMBER >= 10000`.
#define FLASHPACK_VERSION_NUMBER \
  (FLASHPACK_VERSION_MAJOR * 10000 + FLASHPACK_VERSION_MINOR * 100 + FLASHPACK_VERSION_PATCH)
#define FLASHPACK_VERSION_STRING "1.0.0"

#ifdef __cplusplus
namespace flashpack {

/// FLASHPACK_VERSION_STRING as it was when flashpack::engine was compiled. C programs call flashpack_version().
/// Any thread.
const char* version() noexcept;

}  // namespace flashpack
#endif
