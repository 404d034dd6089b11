/// Python objects of what a footer says. The GIL is held throughout.
#pragma once

#include <nanobind/nanobind.h>

#include "flashpack/format.h"

namespace flashpack {

using Dict = nanobind::typed<nanobind::dict, nanobind::str, nanobind::any>;

/// The footer as json.loads would give it, normalised: the keys of the format, in the order in which the writer puts
/// them, without any others that the file has.
Dict footer_dict(const Metadata& metadata);

/// The tensors in file order, each as a `type`: a tuple of name, dtype, shape, file offset and size in bytes, and
/// index.
nanobind::list entries_of(const Metadata& metadata, const nanobind::type_object& type);

}  // namespace flashpack
