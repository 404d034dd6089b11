/// How the engine's threads are started.
#pragma once

#include <pthread.h>

#include <csignal>
#include <thread>
#include <utility>

namespace flashpack::internal {

/// Keeps the signals of the process away from this thread, and from those that it starts, as long as it lives: which
/// thread takes a signal is the application's to say. Faults of the thread itself stay, for whoever handles them.
class SignalsBlocked {
 public:
  SignalsBlocked() noexcept {
    sigset_t signals;
    ::sigfillset(&signals);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT}) ::sigdelset(&signals, fault);
    ::pthread_sigmask(SIG_BLOCK, &signals, &before_);
  }
  ~SignalsBlocked() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

/// A thread that takes no signals, from its first moment on. `name`, at most 15 characters, is what top and debuggers
/// show. Throws: std::system_error when there are no threads to be had.
template <class Body>
std::thread start_thread(const char* name, Body body) {
  const SignalsBlocked blocked;
  return std::thread([name, moved = std::move(body)]() mutable {
    ::pthread_setname_np(::pthread_self(), name);
    moved();
  });
}

}  // namespace flashpack::internal
