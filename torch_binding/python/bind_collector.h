/// Binds the pause of Python's garbage collector. Thread safety: the calling thread has the GIL.
#pragma once

#include <nanobind/nanobind.h>

namespace flashpack {

/// Binds CollectorPause.
void bind_collector(nanobind::module_& module);

}  // namespace flashpack
