/// Python objects of what a footer says. The GIL is held throughout.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string_view>
#include <tuple>
#include <vector>

#include "flashpack/format.h"

namespace flashpack {

using Dict = nanobind::typed<nanobind::dict, nanobind::str, nanobind::any>;
/// dtype, file offset in bytes, length in bytes, length in elements.
using BlockTuple = std::tuple<std::string_view, std::uint64_t, std::uint64_t, std::uint64_t>;

/// The footer as json.loads would give it, normalised: the keys of the format, in the order in which the writer puts
/// them, without any others that the file has.
Dict footer_dict(const Metadata& metadata);

/// The tensors in file order, each as a `type`: a tuple of name, dtype, shape, file offset in bytes, length in
/// elements, size in bytes, macroblock, and offset in that in elements.
nanobind::list entries_of(const Metadata& metadata, const nanobind::type_object& type);

std::vector<BlockTuple> blocks_of(const Metadata& metadata);

}  // namespace flashpack
