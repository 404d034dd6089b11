#include "bind_pack.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "flashpack/error.h"
#include "torch_binding/format/pack_plan.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashpack {

namespace {

/// Source, first element, number of elements, place in the buffer, place of the dense copy.
using StepTuple =
    std::tuple<std::size_t, std::uint64_t, std::uint64_t, std::optional<std::uint64_t>, std::optional<std::uint64_t>>;

struct PyPackGroup {
  StepTuple at(std::size_t i) const {
    if (i >= steps.size()) throw nb::index_error();  // Ends the iteration in Python.
    const PackStep& step = steps[i];
    return {step.source, step.first_elem, step.elems, step.buffer_offset_bytes, step.scratch_offset_bytes};
  }

  PackGroup steps;
};

/// Takes sources and gives steps one by one. A list with a tuple for each would be searched by the garbage collector,
/// which takes longer than the plan.
class PyPackPlan {
 public:
  void add(bool is_contiguous, bool is_final, bool has_rows, bool on_device, std::uint32_t element_bytes,
           std::uint64_t offset_bytes, std::vector<std::int64_t> shape) {
    shapes_.push_back(std::move(shape));
    const PackSource::Form form = PackSource::form_of(is_contiguous, is_final, has_rows);
    sources_.push_back({form, on_device, element_bytes, offset_bytes, shapes_.back()});
  }

  std::vector<PyPackGroup> groups(std::uint64_t buffer_bytes) const {
    std::vector<PyPackGroup> groups;
    for (PackGroup& group : plan_pack(sources_, buffer_bytes)) groups.push_back({std::move(group)});
    return groups;
  }

 private:
  std::deque<std::vector<std::int64_t>> shapes_;  // A deque, because sources borrow its elements.
  std::vector<PackSource> sources_;
};

}  // namespace

void bind_pack(nb::module_& module) {
  module.attr("PACK_BUFFER_BYTES") = kPackBufferBytes;
  module.attr("PACK_GROUPS") = kPackGroups;
  module.attr("PACK_SERIAL_ELEMS") = kPackSerialElems;
  nb::class_<PyPackGroup>(module, "PackGroup", "What one transfer writes.")
      .def("__len__", [](const PyPackGroup& group) { return group.steps.size(); })
      .def("__getitem__", &PyPackGroup::at,
           "Source, first element, number of elements, place in the buffer, place of a dense copy in it.");
  nb::class_<PyPackPlan>(module, "PackPlan", "How tensors get into a file, by the rules that all packers follow.")
      .def(nb::init<>())
      .def("add", &PyPackPlan::add, "is_contiguous"_a, "is_final"_a, "has_rows"_a, "on_device"_a, "element_bytes"_a,
           "offset_bytes"_a, "shape"_a,
           "A source. It is final if it has the file's values where the engine can read them, and has rows if the "
           "elements along its last dim are neighbours.")
      .def("groups", &PyPackPlan::groups, "buffer_bytes"_a, "In the order in which they are to be filled.");
}

}  // namespace flashpack
