#include "footer_objects.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

namespace nb = nanobind;

namespace flashpack {

namespace {

/// Python's cyclic garbage collector does not run meanwhile. It would look again and again at all objects of a process
/// that makes a million at once, and find nothing. For as long as the GIL is held: it is off for other threads, too.
class CollectorPaused {
 public:
  CollectorPaused() : was_enabled_(PyGC_Disable() != 0) {}
  CollectorPaused(const CollectorPaused&) = delete;
  CollectorPaused& operator=(const CollectorPaused&) = delete;
  ~CollectorPaused() {
    if (was_enabled_) PyGC_Enable();
  }

 private:
  bool was_enabled_;
};

}  // namespace

Dict footer_dict(const Metadata& metadata) {
  const CollectorPaused paused;
  const bool several = metadata.version == 4;
  Dict footer;
  footer["format"] = several ? "flashpack_v4" : "flashpack_v3";
  if (!several) footer["target_dtype"] = dtype_name(metadata.macroblocks.at(0).dtype);
  footer["align_bytes"] = metadata.align_bytes;
  if (several) footer["total_payload_bytes"] = metadata.payload_bytes;
  footer["total_elems"] = metadata.total_elems;
  if (several) {
    nb::list blocks;
    for (const Macroblock& block : metadata.macroblocks) {
      nb::dict entry;
      entry["dtype"] = dtype_name(block.dtype);
      entry["offset_bytes"] = block.offset_bytes;
      entry["length_bytes"] = block.length_bytes;
      entry["length_elems"] = block.length_elems;
      blocks.append(entry);
    }
    footer["macroblocks"] = blocks;
  }
  nb::list index;
  for (const TensorRecord& record : metadata.records) {
    nb::dict entry;
    entry["name"] = record.name;
    entry["shape"] = record.shape;
    entry["offset"] = record.offset_elems;
    entry["length"] = record.length_elems;
    if (several) entry["macroblock"] = record.macroblock;
    index.append(entry);
  }
  footer["index"] = index;
  if (!metadata.user_metadata.empty()) footer["metadata"] = metadata.user_metadata;
  return footer;
}

nb::list entries_of(const Metadata& metadata, const nb::type_object& type) {
  const CollectorPaused paused;
  const nb::object make = nb::borrow(reinterpret_cast<PyObject*>(&PyTuple_Type)).attr("__new__");
  nb::list entries;
  for (const TensorRecord& record : metadata.records) {
    entries.append(
        make(type, nb::make_tuple(record.name, dtype_name(metadata.dtype(record)), nb::tuple(nb::cast(record.shape)),
                                  metadata.offset_bytes(record), record.length_elems, metadata.size_bytes(record),
                                  record.macroblock, record.offset_elems)));
  }
  return entries;
}

std::vector<BlockTuple> blocks_of(const Metadata& metadata) {
  std::vector<BlockTuple> blocks;
  blocks.reserve(metadata.macroblocks.size());
  for (const Macroblock& block : metadata.macroblocks) {
    blocks.emplace_back(dtype_name(block.dtype), block.offset_bytes, block.length_bytes, block.length_elems);
  }
  return blocks;
}

}  // namespace flashpack
