/// Binds metadata of files and plans of reads to Python.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string_view>
#include <tuple>

#include "flashpack/checksums.h"

namespace flashpack {

/// File offset in bytes, size in bytes, address in memory.
using ExtentTuple = std::tuple<std::uint64_t, std::uint64_t, std::uintptr_t>;

/// Throws: Error (kInvalidArgument) for an unknown name.
Verify verify_policy(std::string_view name);

void bind_format(nanobind::module_& module);

}  // namespace flashpack
