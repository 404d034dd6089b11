/// Makes Python objects from metadata. Thread safety: the calling thread has the GIL.
#pragma once

#include <nanobind/nanobind.h>

#include "flashpack/checkpoint.h"

namespace flashpack {

using Dict = nanobind::typed<nanobind::dict, nanobind::str, nanobind::any>;

/// Returns the footer as json.loads would, but with the keys of the format only, in the order in which the writer puts
/// them.
Dict footer_dict(const Metadata& metadata);

/// Returns the tensors, file by file. Each is a `type`, which is a tuple of name, dtype, shape, file offset and size in
/// bytes, index, and index of the file.
nanobind::list entries_of(const Checkpoint& checkpoint, const nanobind::type_object& type);

}  // namespace flashpack
