#include "bind_scans.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace flashpack {

namespace {

using Binding = nb::typed<nb::tuple, nb::object, nb::str>;

nb::typed<nb::list, Binding> bindings_of(nb::handle value, const nb::list& modules) {
  // A list may wake the garbage collector, which runs code that may change a module.
  std::vector<std::pair<nb::object, nb::object>> found;
  for (const nb::handle module : modules) {
    // Anything may be in sys.modules. This does not load a module of importlib's LazyLoader, as an attribute would.
    PyObject* const names = PyModule_Check(module.ptr()) ? PyModule_GetDict(module.ptr()) : nullptr;
    if (names == nullptr) continue;
    Py_ssize_t at = 0;
    PyObject* name = nullptr;
    PyObject* each = nullptr;
    while (PyDict_Next(names, &at, &name, &each) != 0) {
      if (each == value.ptr() && PyUnicode_Check(name)) found.emplace_back(nb::borrow(module), nb::borrow(name));
    }
  }
  nb::list list;
  for (const auto& [module, name] : found) list.append(nb::make_tuple(module, name));
  return list;
}

/// Keeps the GIL, because the call is short, and a thread that gives up the GIL may wait for it for milliseconds.
bool is_cached(std::uintptr_t address, std::size_t size_bytes, std::size_t step_bytes) {
  if (step_bytes == 0) throw nb::value_error("step_bytes is 0");
  const auto page_bytes = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  // The kernel answers for a page, and fails for memory that is not mapped.
  const auto is_absent = [&](std::uintptr_t within) {
    unsigned char flags = 0;
    void* const page = reinterpret_cast<void*>(within - within % page_bytes);  // NOLINT(performance-no-int-to-ptr)
    return ::mincore(page, 1, &flags) == 0 && (flags & 1U) == 0;
  };
  for (std::size_t at = 0; at < size_bytes; at += step_bytes) {
    if (is_absent(address + at)) return false;
  }
  return size_bytes == 0 || !is_absent(address + size_bytes - 1);
}

}  // namespace

void bind_scans(nb::module_& module) {
  module.def("bindings_of", &bindings_of, "value"_a, "modules"_a,
             "Returns (module, name) for each global name that stands for this very object.");
  module.def("is_cached", &is_cached, "address"_a, "size_bytes"_a, "step_bytes"_a,
             "Whether the pages of a mapped file at each `step_bytes`, and the last one, are in the page cache. The "
             "kernel tells it only of files that are the caller's own or that it may write; all others seem to be "
             "there. Memory that is not mapped seems to be, too.");
}

}  // namespace flashpack
