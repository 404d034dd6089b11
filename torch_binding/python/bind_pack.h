#pragma once

#include <nanobind/nanobind.h>

namespace flashpack {

/// The rules of packing, which are those of the packer for LibTorch: torch_binding/format/pack_plan.h.
void bind_pack(nanobind::module_& module);

}  // namespace flashpack
