/// Starts the engine's threads. Thread safety: any thread may call; a SignalsBlocked ends in the thread that made it.
#pragma once

#include <pthread.h>

#include <csignal>
#include <thread>
#include <utility>

namespace flashpack::internal {

/// Blocks the process's signals in this thread, and in threads that it starts meanwhile, because the application
/// decides which of its threads take signals. Signals for a thread's own faults are not blocked, so that the
/// application's handlers see them.
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

/// Starts a thread that takes no signals. top and debuggers show `name`, which has at most 15 characters. Throws:
/// std::system_error when the system has no more threads.
template <class Body>
std::thread start_thread(const char* name, Body body) {
  const SignalsBlocked blocked;
  return std::thread([name, moved = std::move(body)]() mutable {
    ::pthread_setname_np(::pthread_self(), name);
    moved();
  });
}

}  // namespace flashpack::internal
