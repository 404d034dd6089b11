#include "bind_format.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "flashpack/format.h"
#include "torch_binding/format/foreign_file.h"
#include "torch_binding/format/pack_plan.h"
#include "torch_binding/format/safetensors_header.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashpack {

namespace {

/// Name, dtype, shape.
using SpecTuple = std::tuple<std::string, std::string, std::vector<std::int64_t>>;
/// Name, file offset in bytes, size in bytes.
using PlaceTuple = std::tuple<std::string, std::uint64_t, std::uint64_t>;

DType require_dtype(std::string_view name) {
  if (const auto dtype = dtype_from_name(name)) return *dtype;
  throw Error(Errc::kInvalidArgument, "Unsupported dtype for packing: " + std::string(name));
}

std::vector<TensorSpec> specs_of(const std::vector<SpecTuple>& tensors) {
  std::vector<TensorSpec> specs;
  specs.reserve(tensors.size());
  for (const auto& [name, dtype, shape] : tensors) specs.push_back({name, require_dtype(dtype), shape});
  return specs;
}

Metadata layout(const std::vector<SpecTuple>& tensors, std::uint64_t align_bytes,
                const std::optional<std::vector<std::string>>& name_order,
                std::map<std::string, std::string> user_metadata, bool checksums) {
  return plan_file(specs_of(tensors), align_bytes, name_order, std::move(user_metadata), checksums);
}

std::vector<PlaceTuple> places_of(const Metadata& metadata) {
  std::vector<PlaceTuple> places;
  places.reserve(metadata.records.size());
  for (const TensorRecord& record : metadata.records) {
    places.emplace_back(record.name, record.offset_bytes, record.size_bytes);
  }
  return places;
}

nb::bytes footer_of(Metadata metadata, std::optional<Checksums> checksums) {
  metadata.checksums = std::move(checksums);
  const std::string footer = encode_footer(metadata);
  return nb::bytes(footer.data(), footer.size());
}

/// The header, and the indices of the tensors in file order.
std::tuple<nb::bytes, std::vector<std::size_t>> header_of(
    const std::vector<SpecTuple>& tensors, const std::optional<std::map<std::string, std::string>>& user_metadata) {
  const auto [bytes, order] = make_safetensors_header(specs_of(tensors), user_metadata);
  return {nb::bytes(bytes.data(), bytes.size()), order};
}

std::vector<std::int64_t> safetensors_shape_of(std::string_view dtype, std::vector<std::int64_t> shape) {
  return safetensors_shape(require_dtype(dtype), std::move(shape));
}

}  // namespace

void bind_format(nb::module_& module) {
  nb::class_<Checksums>(module, "Checksums", "The checksums of a payload, one for each of its stripes.");
  module.attr("STRIPE_BYTES") = Checksums::kStripeBytes;
  nb::class_<Metadata>(module, "Metadata", "Where tensors will be in a file.")
      .def_ro("payload_bytes", &Metadata::payload_bytes)
      .def_prop_ro("places", &places_of, "(name, file offset, size) of each tensor, in file order.")
      .def("footer", &footer_of, "checksums"_a = nb::none(), "The bytes that follow the payload.");
  module.def("layout", &layout, "tensors"_a, "align_bytes"_a, "name_order"_a = nb::none(),
             "user_metadata"_a = nb::dict(), "checksums"_a = false,
             "The layout of (name, dtype, shape) tensors, once it is known that its footer can be read.");
  module.def("safetensors_header", &header_of, "tensors"_a, "user_metadata"_a.none(),
             "The beginning of a safetensors file with (name, dtype, shape) tensors, and their indices in file order.");
  module.def(
      "safetensors_dtype", [](std::string_view dtype) { return safetensors_dtype(require_dtype(dtype)); }, "dtype"_a,
      "The name of a dtype in safetensors; an empty text if its files cannot have it.");
  module.def("safetensors_shape", &safetensors_shape_of, "dtype"_a, "shape"_a, "A shape as safetensors counts it.");
  module.attr("FOREIGN_HEAD_BYTES") = kForeignHeadBytes;
  module.def(
      "what_it_is", [](const nb::bytes& head) { return what_it_is({head.c_str(), head.size()}); }, "head"_a,
      "Says what a file that begins with these bytes is, and the cure; an empty text for what is not known.");
  module.def("element_bytes", [](std::string_view dtype) { return element_bytes(require_dtype(dtype)); }, "dtype"_a);
}

}  // namespace flashpack
