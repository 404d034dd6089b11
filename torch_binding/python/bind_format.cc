#include "bind_format.h"

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "flashpack/format.h"
#include "footer_objects.h"
#include "native_calls.h"
#include "torch_binding/format/segments.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashpack {

namespace {

/// dev, ino, size_bytes, mtime_ns.
using IdentityTuple = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, std::int64_t>;
/// Name, dtype, shape.
using SpecTuple = std::tuple<std::string, std::string, std::vector<std::int64_t>>;
/// Name, file offset in bytes, size in bytes.
using PlaceTuple = std::tuple<std::string, std::uint64_t, std::uint64_t>;
/// Size of a block in bytes, and its phase.
using BlockTuple = std::tuple<std::uint64_t, std::uint64_t>;
/// Indices of blocks, and offsets in the blocks in bytes. Two lists of numbers cost Python's garbage collector nothing.
using PlacesTuple = std::tuple<std::vector<std::size_t>, std::vector<std::uint64_t>>;

Metadata read_footer(int fd, const std::filesystem::path& path) {
  const NativeCall call;
  nb::gil_scoped_release released;
  return read_metadata(fd, path);
}

Metadata parse(std::string_view json, std::uint64_t payload_bytes, const std::filesystem::path& path) {
  const NativeCall call;
  nb::gil_scoped_release released;
  return parse_footer(json, payload_bytes, path);
}

IdentityTuple identity_tuple(const Metadata& metadata) {
  const auto& [dev, ino, size_bytes, mtime_ns] = metadata.identity;
  return {dev, ino, size_bytes, mtime_ns};
}

DType require_dtype(std::string_view name) {
  if (const auto dtype = dtype_from_name(name)) return *dtype;
  throw Error(Errc::kInvalidArgument, "Unsupported dtype for packing: " + std::string(name));
}

Metadata layout(const std::vector<SpecTuple>& tensors, std::uint64_t align_bytes,
                const std::optional<std::vector<std::string>>& name_order,
                std::map<std::string, std::string> user_metadata, bool checksums) {
  std::vector<TensorSpec> specs;
  specs.reserve(tensors.size());
  for (const auto& [name, dtype, shape] : tensors) specs.push_back({name, require_dtype(dtype), shape});

  std::vector<TensorSpec> ordered;
  for (const std::size_t i : file_order(specs, name_order)) ordered.push_back(std::move(specs[i]));
  Metadata metadata = make_layout(ordered, align_bytes);
  metadata.user_metadata = std::move(user_metadata);
  check_footer(metadata, checksums);
  return metadata;
}

std::vector<PlaceTuple> places_of(const Metadata& metadata) {
  std::vector<PlaceTuple> places;
  places.reserve(metadata.records.size());
  for (const TensorRecord& record : metadata.records) {
    places.emplace_back(record.name, record.offset_bytes, record.size_bytes);
  }
  return places;
}

SegmentPlan plan(const Metadata& metadata, const std::vector<std::size_t>& wanted, bool on_device,
                 std::string_view verify, std::uint64_t max_segment_bytes) {
  const auto kind = on_device ? Device::Kind::kCuda : Device::Kind::kHost;
  return plan_segments(metadata, wanted, kind, verify_policy(verify), max_segment_bytes);
}

std::vector<BlockTuple> blocks_of(const SegmentPlan& plan) {
  std::vector<BlockTuple> blocks;
  for (const auto& [size_bytes, phase_bytes] : plan.blocks) blocks.emplace_back(size_bytes, phase_bytes);
  return blocks;
}

PlacesTuple places_in_blocks(const SegmentPlan& plan) {
  PlacesTuple places;
  auto& [blocks, offsets] = places;
  for (const SegmentPlan::Place& place : plan.places) {
    const bool empty = place.segment == SegmentPlan::Place::kNowhere;
    blocks.push_back(empty ? 0 : plan.segments[place.segment].block);
    offsets.push_back(empty ? 0 : plan.block_offset(place));
  }
  return places;
}

std::vector<ExtentTuple> extents_of(const SegmentPlan& plan, const std::vector<std::uintptr_t>& addresses) {
  if (addresses.size() != plan.blocks.size()) throw Error(Errc::kInvalidArgument, "every block has one address");
  std::vector<ExtentTuple> extents;
  extents.reserve(plan.segments.size());
  for (const Segment& segment : plan.segments)
    extents.emplace_back(segment.offset_bytes, segment.size_bytes, addresses[segment.block] + segment.block_offset);
  return extents;
}

nb::bytes footer_of(Metadata metadata, std::optional<Checksums> checksums) {
  metadata.checksums = std::move(checksums);
  const std::string footer = encode_footer(metadata);
  return nb::bytes(footer.data(), footer.size());
}

}  // namespace

Verify verify_policy(std::string_view name) {
  if (name == "auto") return Verify::kAuto;
  if (name == "always") return Verify::kAlways;
  if (name == "never") return Verify::kNever;
  throw Error(Errc::kInvalidArgument, "verify must be auto, always or never, got " + std::string(name));
}

void bind_format(nb::module_& module) {
  module.attr("MAX_SEGMENT_BYTES") = kMaxSegmentBytes;
  nb::class_<Checksums>(module, "Checksums", "The checksums of a payload, one for each MiB.");
  nb::class_<Metadata>(module, "Metadata", "Where tensors are in a file.")
      .def_prop_ro(
          "format", [](const Metadata& metadata) { return format_name(metadata.format); },
          "\"flashpack\" or \"safetensors\".")
      .def_ro("payload_bytes", &Metadata::payload_bytes, "Where the payload ends.")
      .def_ro("user_metadata", &Metadata::user_metadata,
              "A copy of the `metadata` that was given to pack_to_file, or of `__metadata__`.")
      .def_ro("warnings", &Metadata::warnings)
      .def_prop_ro("identity", &identity_tuple, "Device, inode, size in bytes, mtime in nanoseconds.")
      .def_prop_ro("has_checksums", [](const Metadata& metadata) { return metadata.checksums.has_value(); })
      .def_prop_ro("places", &places_of, "(name, file offset, size) of each tensor, in file order.")
      .def_prop_ro("macroblocks", &macroblocks_as_records, "Has each macroblock as if it were one tensor of one dim.")
      .def("entries", &entries_of, "type"_a,
           "The tensors in file order, each as a `type`, which is a tuple of name, dtype, shape, file offset, size in "
           "bytes and index.")
      .def("plan", &plan, "wanted"_a, "on_device"_a, "verify"_a = "auto", "max_segment_bytes"_a = kMaxSegmentBytes,
           "Plans what to read for the tensors at these indices, and where it goes.")
      .def("to_dict", &footer_dict, "The keys of the footer of a flashpack file.")
      .def("footer", &footer_of, "checksums"_a = nb::none(), "The bytes that follow the payload.");
  nb::class_<SegmentPlan>(module, "SegmentPlan",
                          "The bytes to read for tensors of a file, and the blocks of memory that they go to.")
      .def_prop_ro("blocks", &blocks_of,
                   "(size in bytes, phase) of each; on the host the address has to be the phase modulo the page.")
      .def_prop_ro("places", &places_in_blocks,
                   "The block of each wanted tensor, and the offset in that block in bytes; without meaning for "
                   "empty tensors.")
      .def("extents", &extents_of, "addresses"_a, "The extents of a load into blocks at these addresses.");
  module.def("read_footer", &read_footer, "fd"_a, "path"_a,
             "The checked footer of an open flashpack file, or header of a safetensors file; `path` is for messages.");
  module.def("parse_footer", &parse, "json"_a, "payload_bytes"_a, "path"_a,
             "The same for the JSON of a footer, as to_dict() has it, of a file that another process has read.");
  module.def("layout", &layout, "tensors"_a, "align_bytes"_a, "name_order"_a = nb::none(),
             "user_metadata"_a = nb::dict(), "checksums"_a = false,
             "The layout of (name, dtype, shape) tensors, once it is known that its footer can be read.");
  module.def("element_bytes", [](std::string_view dtype) { return element_bytes(require_dtype(dtype)); }, "dtype"_a);
}

}  // namespace flashpack
