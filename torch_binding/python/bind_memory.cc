#include "bind_memory.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "flashpack/detail/owner_process.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashpack {

namespace {

int fill_buffer(PyObject* self, Py_buffer* view, int flags) {
  const std::span<std::byte> bytes = nb::inst_ptr<HostMemory>(self)->bytes();
  return PyBuffer_FillInfo(view, self, bytes.data(), static_cast<Py_ssize_t>(bytes.size()), 0, flags);
}

}  // namespace

const HostMemoryPool& pool_of_process() {
  struct Own {
    detail::OwnerProcess owner;
    HostMemoryPool pool;
  };
  // It is never destroyed, because tensors and threads of Python may use the pool while the process ends, after static
  // objects have been destroyed.
  static Own& own = *new Own;
  if (!own.owner.is_current()) own = {};
  return own.pool;
}

void bind_memory(nb::module_& module) {
  static std::array<PyType_Slot, 2> slots = {{{Py_bf_getbuffer, reinterpret_cast<void*>(&fill_buffer)}, {0, nullptr}}};
  nb::class_<HostMemory>(module, "HostMemory", nb::type_slots(slots.data()), nb::is_weak_referenceable(),
                         "Memory to read to: a writable buffer.")
      .def(
          "__init__",
          [](HostMemory* self, std::size_t size_bytes, std::uint64_t offset_bytes) {
            new (self) HostMemory(pool_of_process(), size_bytes, offset_bytes);
          },
          "size_bytes"_a, "offset_bytes"_a = 0,
          "Its contents are unspecified; its address is `offset_bytes` modulo a page.");
  module.def(
      "kept_memory_bytes", [] { return pool_of_process().kept_bytes(); },
      "The size of the memory on the host that is kept for the next load, in bytes. The kernel may have taken some "
      "of it.");
  module.def(
      "release_kept_memory", [] { pool_of_process().release_kept(); },
      "Gives the memory that is kept for the next load back to the system.");
}

}  // namespace flashpack
