/// Ends native calls before the interpreter ends.
///
/// At its end, Python unwinds the stack of each daemon thread that wants the GIL. Through C++ that is std::terminate(),
/// which leaves temporary files behind. Therefore an atexit handler cancels the calls of other threads and waits for
/// them, and later calls raise SystemExit, which ends their thread silently. Threads touch all of this only while they
/// hold the GIL.
#pragma once

#include <nanobind/nanobind.h>
#include <pthread.h>

#include <chrono>
#include <optional>
#include <thread>
#include <utility>

#include "flashpack/error.h"

namespace flashpack {

struct NativeCalls {
  int under_way = 0;  ///< Calls under way, nested ones included.
  std::optional<std::thread::id> ended_by;
};
inline NativeCalls native_calls;

/// Throws SystemExit if another thread has ended the interpreter.
inline void leave_if_ended() {
  if (!native_calls.ended_by || *native_calls.ended_by == std::this_thread::get_id()) return;
  PyErr_SetString(PyExc_SystemExit, "the interpreter is ending");
  throw nanobind::python_error();
}

inline void enter_call() {
  leave_if_ended();
  ++native_calls.under_way;
}

inline void leave_call() {
  // A child that was forked within a call has begun to count anew, and leaves that call, too.
  if (native_calls.under_way > 0) --native_calls.under_way;
}

/// Counts a call that may release the GIL, as long as the call lasts.
class NativeCall {
 public:
  NativeCall() { enter_call(); }
  ~NativeCall() { leave_call(); }
  NativeCall(const NativeCall&) = delete;
  NativeCall& operator=(const NativeCall&) = delete;
};

/// Returns `function` for a binding: it is refused while another call of this kind uses the same object, from another
/// thread or from the handler of a signal, which could find the object half changed because the GIL is released. The
/// class has a member `bool in_use`.
template <typename Class, typename Result, typename... Args>
auto one_at_a_time(Result (Class::*function)(Args...)) {
  struct Use {
    explicit Use(bool& flag) : in_use(flag) {
      if (in_use) throw Error(Errc::kInvalidArgument, "another call is using this object, which takes one at a time");
      in_use = true;
    }
    ~Use() { in_use = false; }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    bool& in_use;
  };
  return [function](Class& self, Args... args) -> Result {
    const Use use(self.in_use);
    return (self.*function)(std::forward<Args>(args)...);
  };
}

/// Releases the GIL, for calls that must not fail, such as destructors. It keeps the GIL if the interpreter has ended,
/// because a thread cannot take it again then.
class ReleasedUnlessEnded {
 public:
  ReleasedUnlessEnded() {
    if (native_calls.ended_by) return;
    ++native_calls.under_way;
    released_.emplace();
  }
  ~ReleasedUnlessEnded() {
    if (!released_) return;
    released_.reset();
    leave_call();
  }
  ReleasedUnlessEnded(const ReleasedUnlessEnded&) = delete;
  ReleasedUnlessEnded& operator=(const ReleasedUnlessEnded&) = delete;

 private:
  std::optional<nanobind::gil_scoped_release> released_;
};

/// Returns when no other thread is in a call, or after half a minute, because a callback of the application may not
/// return.
inline void end_native_calls() {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  native_calls.ended_by = std::this_thread::get_id();
  while (native_calls.under_way > 0 && std::chrono::steady_clock::now() < deadline) {
    const nanobind::gil_scoped_release released;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

/// To be called once, by the module's initialisation.
inline void bind_native_calls(nanobind::module_& module) {
  module.def("enter_call", &enter_call, "For calls that are more than native ones: the end of the interpreter waits.");
  module.def("leave_call", &leave_call);
  nanobind::module_::import_("atexit").attr("register")(nanobind::cpp_function(&end_native_calls));
  // The child does not have the other threads.
  pthread_atfork(nullptr, nullptr, [] { native_calls = {}; });
}

}  // namespace flashpack
