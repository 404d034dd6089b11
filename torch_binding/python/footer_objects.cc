#include "footer_objects.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

namespace nb = nanobind;

namespace flashpack {

namespace {

/// Pauses Python's cyclic garbage collector, which would search all objects again and again while a million are made,
/// and find nothing. The GIL must be held meanwhile, because the collector pauses for other threads, too.
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

/// The records as the footer has them.
nb::list index_of(const Metadata& metadata) {
  const Container& container = metadata.container;
  nb::list index;
  for (std::size_t i = 0; i < metadata.records.size(); ++i) {
    const TensorRecord& record = metadata.records[i];
    const std::uint32_t macroblock = container.macroblock_of[i];
    const std::uint64_t width_bytes = element_bytes(record.dtype);
    nb::dict entry;
    entry["name"] = record.name;
    entry["shape"] = record.shape;
    entry["offset"] = (record.offset_bytes - container.macroblocks[macroblock].offset_bytes) / width_bytes;
    entry["length"] = record.size_bytes / width_bytes;
    if (container.version == 4) entry["macroblock"] = macroblock;
    index.append(entry);
  }
  return index;
}

}  // namespace

Dict footer_dict(const Metadata& metadata) {
  const CollectorPaused paused;
  const Container& container = metadata.container;
  const bool several = container.version == 4;
  Dict footer;
  footer["format"] = several ? "flashpack_v4" : "flashpack_v3";
  if (!several) footer["target_dtype"] = dtype_name(container.macroblocks.at(0).dtype);
  footer["align_bytes"] = container.align_bytes;
  if (several) footer["total_payload_bytes"] = metadata.payload_bytes;
  footer["total_elems"] = container.total_elems;
  if (several) {
    nb::list blocks;
    for (const Macroblock& block : container.macroblocks) {
      nb::dict entry;
      entry["dtype"] = dtype_name(block.dtype);
      entry["offset_bytes"] = block.offset_bytes;
      entry["length_bytes"] = block.length_bytes;
      entry["length_elems"] = block.length_elems;
      blocks.append(entry);
    }
    footer["macroblocks"] = blocks;
  }
  footer["index"] = index_of(metadata);
  if (!metadata.user_metadata.empty()) footer["metadata"] = metadata.user_metadata;
  return footer;
}

nb::list entries_of(const Checkpoint& checkpoint, const nb::type_object& type) {
  const CollectorPaused paused;
  const nb::object make = nb::borrow(reinterpret_cast<PyObject*>(&PyTuple_Type)).attr("__new__");
  nb::list entries;
  for (std::size_t i = 0; i < checkpoint.size(); ++i) {
    const TensorRecord& record = checkpoint.record(i);
    entries.append(make(type, nb::make_tuple(record.name, dtype_name(record.dtype), nb::tuple(nb::cast(record.shape)),
                                             record.offset_bytes, record.size_bytes, i, checkpoint.file_of(i))));
  }
  return entries;
}

}  // namespace flashpack
