/// Binds the plan of a file's bytes to Python. Thread safety: the calling thread has the GIL.
#pragma once

#include <nanobind/nanobind.h>

namespace flashpack {

/// Binds torch_binding/format/pack_plan.h, so that Python packs by the same plan as LibTorch.
void bind_pack(nanobind::module_& module);

}  // namespace flashpack
