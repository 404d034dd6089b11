/// Binds HostMemory to Python.
///
/// Thread safety: the calling thread has the GIL.
#pragma once

#include <nanobind/nanobind.h>

#include "flashpack/host_memory.h"

namespace flashpack {

/// The pool of the package's memory and engines. A forked child has one of its own, as it has engines of its own.
/// Requires: the GIL.
const HostMemoryPool& pool_of_process();

void bind_memory(nanobind::module_& module);

}  // namespace flashpack
