#pragma once

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <functional>
#include <future>
#include <thread>
#include <utility>
#include <vector>

#include "tests/support/sanitizers.h"

namespace flashpack::testing {

/// What `body` of run_in_child() gives back where this machine does not let it try.
constexpr int kSkip = 77;

/// Runs `body` in a forked child and gives its exit status, or -1 when a signal ended it.
/// Fork before any thread is started: ThreadSanitizer allows new threads only in the child of a single-threaded
/// process.
inline int run_in_child(const std::function<int()>& body) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(body());
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/// The same, in a child that has the pid of its parent, in a pid namespace of its own. kSkip where that is not allowed.
inline int run_in_child_with_same_pid(const std::function<int()>& body) {
  const auto pid = static_cast<int>(::getpid());
  const auto begin_namespace = [&] {
    // The kernel gives the next process the next number.
    std::ofstream last_pid("/proc/sys/kernel/ns_last_pid");
    if (!(last_pid << pid - 1 << std::flush)) return kSkip;
    return run_in_child([&] { return ::getpid() == pid ? body() : kSkip; });
  };
  return run_in_child([&] { return ::unshare(CLONE_NEWPID) == 0 ? run_in_child(begin_namespace) : kSkip; });
}

/// From here on this thread, and those that it starts, get `error_number` for system call `number`, as under a
/// container's seccomp profile. With `flags` SECCOMP_FILTER_FLAG_TSYNC: every thread of the process.
inline bool deny_syscall(unsigned number, unsigned error_number, unsigned flags = 0) {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error_number), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  sock_fprog filter{4, program};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &filter) == 0;
}

/// From here on each call of `numbers` by this thread, and by threads that it starts, is shown to `answer` before the
/// kernel sees it: 0 lets it through, anything else is the errno that it fails with. `answer` runs on a thread of its
/// own. There is no way back: for a child of run_in_child(). False where that is not allowed.
inline bool intercept_syscalls(const std::vector<long>& numbers, std::function<int(const seccomp_data&)> answer) {
  if (kThreadSanitizer) return false;  // The kernel orders the threads, which the sanitizer cannot see.
  std::vector<sock_filter> program = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr))};
  for (const long number : numbers) {
    program.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<unsigned>(number), 0, 1));
    program.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF));
  }
  program.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  const sock_fprog filter{static_cast<unsigned short>(program.size()), program.data()};

  // Started before the filter is there, so that it is not one of those that wait for it.
  std::promise<void> started;
  std::future<void> start = started.get_future();
  std::promise<int> listener;
  std::thread([started = std::move(started), fd = listener.get_future(), answer = std::move(answer)]() mutable {
    started.set_value();
    const int listener_fd = fd.get();
    while (listener_fd >= 0) {
      seccomp_notif call{};
      if (::ioctl(listener_fd, SECCOMP_IOCTL_NOTIF_RECV, &call) != 0) continue;
      const int error_number = answer(call.data);
      seccomp_notif_resp response{.id = call.id, .val = 0, .error = -error_number, .flags = 0};
      if (error_number == 0) response.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
      ::ioctl(listener_fd, SECCOMP_IOCTL_NOTIF_SEND, &response);
    }
  }).detach();
  start.wait();  // A sanitizer starts one thread at a time, so the next one would wait for this one, and it for that.
  const bool allowed = ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0;
  const long fd =
      allowed ? ::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &filter) : -1;
  listener.set_value(static_cast<int>(fd));
  return fd >= 0;
}

/// From here on this process can lock 64 KiB of memory, as in most containers.
inline bool drop_lockable_memory() {
  constexpr unsigned kIpcLock = 14;                // Of <linux/capability.h>.
  constexpr std::uint32_t kVersion3 = 0x20080522;  // Of capget(2) and capset(2).
  struct Header {
    std::uint32_t version;
    int pid;
  } header{kVersion3, 0};
  struct Data {
    std::uint32_t effective, permitted, inheritable;
  } data[2]{};
  const rlimit little{64 << 10, 64 << 10};
  if (::setrlimit(RLIMIT_MEMLOCK, &little) != 0 || ::syscall(SYS_capget, &header, data) != 0) return false;
  data[0].effective &= ~(1u << kIpcLock);
  data[0].permitted &= ~(1u << kIpcLock);
  return ::syscall(SYS_capset, &header, data) == 0;
}

}  // namespace flashpack::testing
