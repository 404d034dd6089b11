/// Binds the layout of new files to Python.
///
/// Thread safety: the calling thread has the GIL.
#pragma once

#include <nanobind/nanobind.h>

namespace flashpack {

void bind_format(nanobind::module_& module);

}  // namespace flashpack
