#include "bind_collector.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

namespace nb = nanobind;
using namespace nb::literals;

namespace flashpack {

namespace {

PyObject* get_threshold = nullptr;  // The process owns them. The module could be unloaded by the collector.
PyObject* set_threshold = nullptr;

// Nobody makes so many objects between two collections, and nobody else sets this value.
constexpr int kPaused = std::numeric_limits<int>::max();

int threshold() {
  const nb::handle get = get_threshold;
  return nb::cast<int>(get()[0]);
}

void set(int to) {
  const nb::handle set_first = set_threshold;
  set_first(to);
}

// These change with the GIL held and while no byte code runs, so that neither another thread nor a signal handler comes
// in between.
int pauses = 0;
thread_local int pauses_of_this_thread = 0;
std::optional<int> before;  // The end of the last pause sets it again.

// Another threshold has been set by somebody meanwhile, and is left.
void collect_again_after_the_last() {
  if (pauses > 0 || !before) return;
  const nb::error_scope raised;
  const int given_back = *std::exchange(before, std::nullopt);
  try {
    if (threshold() == kPaused) set(given_back);
  } catch (nb::python_error& error) {
    error.discard_as_unraisable("the end of a pause of the garbage collector");
  }
}

/// The collector is paused by its threshold, not by gc.disable(), which callers use themselves, perhaps in another
/// thread while a load runs: to give back the state of before would undo that.
class CollectorPause {
 public:
  CollectorPause() = default;
  CollectorPause(const CollectorPause&) = delete;
  CollectorPause& operator=(const CollectorPause&) = delete;
  ~CollectorPause() { end(); }

  void begin() {
    if (is_under_way_) return;
    const int now = threshold();
    if (now != 0 && now != kPaused) {  // With 0 the caller collects nothing.
      before = now;
      set(kPaused);
    }
    is_under_way_ = true;
    ++pauses;
    ++pauses_of_this_thread;
  }

  void end() {
    if (!std::exchange(is_under_way_, false)) return;
    --pauses;
    --pauses_of_this_thread;
    collect_again_after_the_last();
  }

 private:
  bool is_under_way_ = false;
};

// The other threads, which would have ended their pauses, are not in the child.
void forget_pauses_of_other_threads() {
  pauses = std::max(0, pauses_of_this_thread);
  collect_again_after_the_last();
}

}  // namespace

void bind_collector(nb::module_& module) {
  const nb::module_ collector = nb::module_::import_("gc");
  get_threshold = collector.attr("get_threshold").inc_ref().ptr();
  set_threshold = collector.attr("set_threshold").inc_ref().ptr();
  nb::module_::import_("os").attr("register_at_fork")("after_in_child"_a =
                                                          nb::cpp_function(&forget_pauses_of_other_threads));
  nb::class_<CollectorPause>(
      module, "CollectorPause",
      "Within it, Python's cyclic garbage collector does not run by itself, which would look again and again at a "
      "million objects that are made. Pauses of several threads may overlap; the collector is as before when the last "
      "has ended, also after an interrupt.")
      .def(nb::init<>())
      .def("__enter__", [](CollectorPause& self) { self.begin(); })
      .def(
          "__exit__", [](CollectorPause& self, const nb::args&) { self.end(); },
          nb::sig("def __exit__(self, *error: object) -> None"));
}

}  // namespace flashpack
