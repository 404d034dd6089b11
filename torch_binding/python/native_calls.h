/// What becomes of native calls when the interpreter ends.
///
/// Python ends daemon threads where they next take the GIL, by unwinding their stack; through C++ that is
/// std::terminate(), and nobody removes temporary files. So before it does, in an atexit handler, calls of other
/// threads are cancelled and waited for, and new ones are refused by SystemExit, which ends a thread without a word.
/// Everything here is touched only by who holds the GIL.
#pragma once

#include <nanobind/nanobind.h>
#include <pthread.h>

#include <chrono>
#include <optional>
#include <thread>

namespace flashpack {

struct NativeCalls {
  int under_way = 0;  ///< Nested ones count, too.
  std::optional<std::thread::id> ended_by;
};
inline NativeCalls native_calls;

/// Throws SystemExit in threads that have outlived the interpreter.
inline void leave_if_ended() {
  if (!native_calls.ended_by || *native_calls.ended_by == std::this_thread::get_id()) return;
  PyErr_SetString(PyExc_SystemExit, "the interpreter is ending");
  throw nanobind::python_error();
}

inline void enter_call() {
  leave_if_ended();
  ++native_calls.under_way;
}

inline void leave_call() { --native_calls.under_way; }

/// Lives as long as a call that may give up the GIL.
class NativeCall {
 public:
  NativeCall() { enter_call(); }
  ~NativeCall() { leave_call(); }
  NativeCall(const NativeCall&) = delete;
  NativeCall& operator=(const NativeCall&) = delete;
};

/// Gives up the GIL for calls that must not fail, such as destructors, which may come when it cannot be had again.
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
    --native_calls.under_way;
  }
  ReleasedUnlessEnded(const ReleasedUnlessEnded&) = delete;
  ReleasedUnlessEnded& operator=(const ReleasedUnlessEnded&) = delete;

 private:
  std::optional<nanobind::gil_scoped_release> released_;
};

/// Returns when no other thread is in a call; or in half a minute, if code that is not ours, such as a callback, holds
/// one up.
inline void end_native_calls() {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  native_calls.ended_by = std::this_thread::get_id();
  while (native_calls.under_way > 0 && std::chrono::steady_clock::now() < deadline) {
    const nanobind::gil_scoped_release released;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

/// To be called once, when the module is made.
inline void bind_native_calls(nanobind::module_& module) {
  module.def("enter_call", &enter_call, "For calls that are more than native ones: the end of the interpreter waits.");
  module.def("leave_call", &leave_call);
  nanobind::module_::import_("atexit").attr("register")(nanobind::cpp_function(&end_native_calls));
  // The other threads do not exist in the child.
  pthread_atfork(nullptr, nullptr, [] { native_calls = {}; });
}

}  // namespace flashpack
