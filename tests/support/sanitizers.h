#pragma once

// Which sanitizers this program is built with. GCC says it by macros, and clang by features.

#if defined(__SANITIZE_ADDRESS__)
#define FLASHPACK_ASAN 1
#elif defined(__has_feature)
#define FLASHPACK_ASAN __has_feature(address_sanitizer)
#else
#define FLASHPACK_ASAN 0
#endif

#if defined(__SANITIZE_THREAD__)
#define FLASHPACK_TSAN 1
#elif defined(__has_feature)
#define FLASHPACK_TSAN __has_feature(thread_sanitizer)
#else
#define FLASHPACK_TSAN 0
#endif

#if defined(__cplusplus)
namespace flashpack::testing {
inline constexpr bool kAddressSanitizer = FLASHPACK_ASAN;
inline constexpr bool kThreadSanitizer = FLASHPACK_TSAN;
inline constexpr bool kSanitizer = kAddressSanitizer || kThreadSanitizer;
}  // namespace flashpack::testing
#endif
