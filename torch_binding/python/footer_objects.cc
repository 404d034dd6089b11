#include "footer_objects.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "torch_binding/format/footer_json.h"

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

}  // namespace

Dict footer_dict(const Metadata& metadata) {
  const CollectorPaused paused;
  const std::string json = footer_json(metadata, nullptr);
  return nb::cast<Dict>(nb::module_::import_("json").attr("loads")(nb::str(json.data(), json.size())));
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
