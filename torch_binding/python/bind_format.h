/// Binds the layout of new files to Python.
#pragma once

#include <nanobind/nanobind.h>

namespace flashpack {

void bind_format(nanobind::module_& module);

}  // namespace flashpack
