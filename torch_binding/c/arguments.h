/// Takes the arguments of the C API from its callers, who may have made mistakes or have another version of a struct.
/// require(), result_of(), array() and one_of() take single arguments, and the others take and fill structs.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <string>

#include "engine/ground/error.h"
#include "flashpack/error.h"
#include "flashpack/flashpack.h"

namespace flashpack::c {

using internal::argument_error;

/// Throws: Error (kInvalidArgument), if `pointer` is null.
template <typename T>
T& require(T* pointer, const char* name) {
  if (!pointer) throw argument_error(std::string(name) + " is NULL");
  return *pointer;
}

/// Like require(), for the place of a result, which is null until there is one.
template <typename T>
T*& result_of(T** pointer, const char* name) {
  return require(pointer, name) = nullptr;
}

/// `count` elements at `elements`, which may be null if there are none.
template <typename T>
std::span<const T> array(const T* elements, std::size_t count, const char* name) {
  if (count > 0) require(elements, name);
  return {elements, count};
}

/// The size that each struct had when it was first released: what every caller has at least. A field that is added
/// later does not change it.
template <typename T>
inline constexpr std::size_t kFirstSize = 0;
#define FIRST_ENDS_WITH(type, field) \
  template <>                        \
  inline constexpr std::size_t kFirstSize<type> = offsetof(type, field) + sizeof(type::field)
FIRST_ENDS_WITH(flashpack_engine_options, numa_node);
FIRST_ENDS_WITH(flashpack_engine_info, fallback_reason);
FIRST_ENDS_WITH(flashpack_checkpoint_info, metadata_count);
FIRST_ENDS_WITH(flashpack_file, has_checksums);
FIRST_ENDS_WITH(flashpack_tensor, size_bytes);
FIRST_ENDS_WITH(flashpack_metadata, value_bytes);
FIRST_ENDS_WITH(flashpack_open_file_info, alignment_bytes);
FIRST_ENDS_WITH(flashpack_load_request, tag);
FIRST_ENDS_WITH(flashpack_progress, finished);
FIRST_ENDS_WITH(flashpack_stats, fallback_reason);
FIRST_ENDS_WITH(flashpack_verify_report, seconds);
FIRST_ENDS_WITH(flashpack_writer_options, reserved);
FIRST_ENDS_WITH(flashpack_write_request, tag);
FIRST_ENDS_WITH(flashpack_save_options, stream);
#undef FIRST_ENDS_WITH

template <typename T>
std::size_t size_of(const T& of_caller, const char* name) {
  static_assert(kFirstSize<T> > 0, "every struct of the C API is listed above");
  if (of_caller.struct_size >= kFirstSize<T>) return of_caller.struct_size;
  throw argument_error(std::string(name) + "->struct_size is " + std::to_string(of_caller.struct_size) +
                       " and should be " + std::to_string(sizeof(T)));
}

/// Returns a copy, of which fields that the caller does not know are 0. Throws: Error (kInvalidArgument) if he sets one
/// that this library does not know.
template <typename T>
T given(const T& of_caller, const char* name) {
  const std::size_t size = size_of(of_caller, name);
  const auto* bytes = reinterpret_cast<const std::byte*>(&of_caller);
  if (size > sizeof(T) &&
      std::any_of(bytes + sizeof(T), bytes + size, [](std::byte byte) { return byte != std::byte{}; }))
    throw argument_error(std::string(name) + " has a field that flashpack " FLASHPACK_VERSION_STRING " does not know");
  T copy{};
  std::memcpy(&copy, bytes, std::min(size, sizeof(T)));
  return copy;
}

/// The same for options, for which null means the defaults.
template <typename T>
T given_or_default(const T* of_caller, const char* name) {
  return of_caller ? given(*of_caller, name) : T{};
}

/// Copies `value` to the caller's struct, whose size stays. Fields that this library does not know become 0.
template <typename T>
void give(T value, T* of_caller, const char* name) {
  const std::size_t size = size_of(require(of_caller, name), name);
  value.struct_size = size;
  auto* bytes = reinterpret_cast<std::byte*>(of_caller);
  std::memcpy(bytes, &value, std::min(size, sizeof(T)));
  if (size > sizeof(T)) std::fill(bytes + sizeof(T), bytes + size, std::byte{});
}

/// The enumerator with the value that the C API gives it, which is that of the C++ API.
template <typename Enum>
Enum one_of(int32_t value, Enum last, const char* name) {
  if (value >= 0 && value <= static_cast<int32_t>(last)) return static_cast<Enum>(value);
  throw argument_error(std::string(name) + " has no value " + std::to_string(value));
}

}  // namespace flashpack::c
