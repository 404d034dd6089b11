/// Binds loops that are too long for Python. Thread safety: the calling thread has the GIL.
#pragma once

#include <nanobind/nanobind.h>

namespace flashpack {

/// Binds loops that are too long for Python: over the names of a namespace, and over the pages of a mapping.
void bind_scans(nanobind::module_& module);

}  // namespace flashpack
