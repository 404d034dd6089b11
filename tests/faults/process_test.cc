// Loads by processes that may do less than others, and what their children keep.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <sched.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang.h"
#include "tests/support/sandbox.h"
#include "tests/support/small_loads.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

using testing::GuardedMemory;
using testing::kMiB;
using testing::kSkip;
using testing::request;
using testing::right;
using testing::run_in_child;
using testing::small_engine;

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// A load through slots, more often than there are slots, that must give the right bytes. 0, or what is wrong.
int load_through_slots(const std::filesystem::path& path, const std::vector<std::byte>& bytes, const char* reason) {
  Engine engine(small_engine());
  for (int i = 0; i < 3; ++i) {
    GuardedMemory memory(bytes.size(), 64);
    const TransferStats stats = engine.load(request(path, memory, CachePolicy::kDirect));
    if (!right(memory, bytes)) return 1;
    if (i == 2 && !has(stats.fallback_reason, reason)) return 2;
  }
  return 0;
}

// Loads a little that is cached, which the calling thread reads.
TransferStats load_at_once(Engine& engine, const std::filesystem::path& path) {
  std::ifstream(path).ignore(kMiB);
  GuardedMemory memory(4096);
  LoadRequest little;
  little.files.push_back({.extents = {{0, memory.size(), memory.data()}}, .handle = engine.open(path)});
  return engine.load(std::move(little));
}

std::string status_line(const std::filesystem::path& process, const char* name) {
  std::ifstream in(process / "status");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind(name, 0) == 0) return line.substr(std::strlen(name));
  }
  return "";
}

bool has_ring(pid_t process) {
  for (const auto& fd : std::filesystem::directory_iterator("/proc/" + std::to_string(process) + "/fd")) {
    std::error_code gone;
    if (has(std::filesystem::read_symlink(fd, gone).string(), "io_uring")) return true;
  }
  return false;
}

// Lives until this goes.
class IdleChild {
 public:
  IdleChild() : pid_(::fork()) {
    while (pid_ == 0) ::pause();
  }
  ~IdleChild() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  IdleChild(const IdleChild&) = delete;
  IdleChild& operator=(const IdleChild&) = delete;

  pid_t pid() const { return pid_; }

 private:
  const pid_t pid_;
};

class ConfinedTest : public ::testing::Test {
 protected:
  ConfinedTest() { testing::write_file(dir_ / "file", bytes_); }

  int run_as_somebody_else(const std::function<int()>& body) {
    ::chmod(dir_.path().c_str(), 0755);
    ::chmod((dir_ / "file").c_str(), 0644);
    return run_in_child([&] {
      if (::geteuid() != 0 || ::setresuid(65534, 65534, 65534) != 0) return kSkip;
      return body();
    });
  }

  testing::TempDir dir_;
  std::vector<std::byte> bytes_ = testing::random_bytes(9 * kMiB + 5);
};

TEST_F(ConfinedTest, EachSystemCallOfIoUringMayBeRefusedAndTheReasonIsTold) {
  struct Case {
    long number;
    int error_number;
    const char* reason;
  };
  for (const auto& [number, error_number, reason] :
       {Case{SYS_io_uring_setup, EPERM, "io_uring"}, Case{SYS_io_uring_setup, ENOSYS, "io_uring"},
        Case{SYS_io_uring_enter, EPERM, "io_uring"}, Case{SYS_io_uring_register, EPERM, "registered buffers"}}) {
    const int status = run_in_child([&, n = number, e = error_number, r = reason] {
      if (!testing::deny_syscall(static_cast<unsigned>(n), static_cast<unsigned>(e))) return kSkip;
      return load_through_slots(dir_ / "file", bytes_, r);
    });
    if (status == kSkip) GTEST_SKIP() << "seccomp filters are not allowed here";
    EXPECT_EQ(status, 0) << number << " " << error_number;
  }
}

TEST_F(ConfinedTest, LittleLockableMemoryIsNoErrorAndTheReasonIsTold) {
  const int status = run_in_child([&] {
    if (!testing::drop_lockable_memory()) return kSkip;
    if (Engine(small_engine()).options().backend == Backend::kWorkers) return kSkip;
    return load_through_slots(dir_ / "file", bytes_, "raise ulimit -l");
  });
  if (status == kSkip) GTEST_SKIP() << "the capability cannot be dropped, or there is no io_uring";
  EXPECT_EQ(status, 0);
}

// As a server does it: threads first, then the signal is blocked and waited for.
TEST_F(ConfinedTest, ASignalThatTheApplicationWaitsForIsNotTakenByTheEngine) {
  const int status = run_in_child([&] {
    Engine engine(small_engine());
    GuardedMemory memory(bytes_.size(), 64);
    engine.load(request(dir_ / "file", memory));
    sigset_t wanted;
    ::sigemptyset(&wanted);
    ::sigaddset(&wanted, SIGTERM);
    ::pthread_sigmask(SIG_BLOCK, &wanted, nullptr);
    ::kill(::getpid(), SIGTERM);
    int taken = 0;
    return ::sigwait(&wanted, &taken) == 0 && taken == SIGTERM ? 0 : 1;
  });
  EXPECT_EQ(status, 0) << "-1: a thread of the engine died of it, and all with it";
}

// The engine's threads in this process, or 100 when one of them blocks what it should not, or does not what it should.
int well_behaved_threads() {
  int named = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    if (!has(status_line(task, "Name:"), "flashpack-")) continue;
    const std::uint64_t blocked = std::stoull(status_line(task, "SigBlk:"), nullptr, 16);
    ++named;
    const auto blocks = [blocked](int signal) { return (blocked >> (signal - 1)) & 1; };
    if (!blocks(SIGTERM) || !blocks(SIGCHLD) || !blocks(SIGRTMAX) || blocks(SIGSEGV) || blocks(SIGBUS)) return 100;
  }
  return named;
}

TEST_F(ConfinedTest, ThreadsOfTheEngineHaveNamesAndLeaveTheirOwnFaultsToTheApplicationsHandlers) {
  const int status = run_in_child([&] {
    const Engine engine(small_engine());
    const auto end = std::chrono::steady_clock::now() + testing::kHang;
    int threads = 0;
    // One that is only starting blocks everything for a moment.
    while ((threads = well_behaved_threads()) != 3 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    return threads;
  });
  EXPECT_EQ(status, 3) << "a driver and two workers are wanted";
}

// The engine's threads in this process, or 100 when one of them may run elsewhere than on `cpu`.
int threads_on(int cpu) {
  int named = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    if (!has(status_line(task, "Name:"), "flashpack-")) continue;
    if (status_line(task, "Cpus_allowed_list:") != "\t" + std::to_string(cpu)) return 100;
    ++named;
  }
  return named;
}

TEST_F(ConfinedTest, ThreadsOfTheEngineRunOnTheCpusOfItsOptionsAndTheCallersStayWhereTheyWere) {
  cpu_set_t allowed;
  ASSERT_EQ(::sched_getaffinity(0, sizeof allowed, &allowed), 0);
  if (CPU_COUNT(&allowed) < 2) GTEST_SKIP() << "there is one CPU, on which all threads run";
  int cpu = CPU_SETSIZE - 1;
  while (!CPU_ISSET(static_cast<unsigned>(cpu), &allowed)) --cpu;
  const int status = run_in_child([&] {
    EngineOptions options = small_engine();
    options.cpu_affinity = {cpu};
    const Engine engine(options);
    const auto end = std::chrono::steady_clock::now() + testing::kHang;
    int threads = 0;
    // One that is only starting has no name for a moment.
    while ((threads = threads_on(cpu)) < 3 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    cpu_set_t callers;
    return ::sched_getaffinity(0, sizeof callers, &callers) == 0 && CPU_EQUAL(&callers, &allowed) ? threads : 101;
  });
  EXPECT_EQ(status, 3) << "100: a thread may run elsewhere; 101: the caller was bound; else fewer than were started";
}

// 0, or what the child that goes on living has of an engine of its parent's that does not: 1 its ring, 2 its memory.
int leave_a_child_behind(const std::filesystem::path& path, std::size_t size_bytes, bool ring_can_be_hidden) {
  const auto pinned = [] { return std::stoull(status_line("/proc/self", "VmPin:")); };
  const auto before = pinned();
  auto engine = std::make_unique<Engine>(small_engine());
  GuardedMemory memory(size_bytes, 64);
  for (int i = 0; i < 3; ++i) engine->load(request(path, memory, CachePolicy::kDirect));
  if (pinned() == before) return kSkip;
  const IdleChild child;
  if (has_ring(child.pid()) && ring_can_be_hidden) return 1;
  engine.reset();
  return pinned() == before ? 0 : 2;
}

TEST_F(ConfinedTest, AForkedChildKeepsNothingOfItsParentsEngine) {
  const int status = run_in_child([&] { return leave_a_child_behind(dir_ / "file", bytes_.size(), true); });
  if (status == kSkip) GTEST_SKIP() << "no slots are registered here";
  EXPECT_EQ(status, 0);
}

TEST_F(ConfinedTest, WhereTheRingCannotBeHiddenAForkedChildDoesNotKeepTheMemory) {
  const int status = run_in_child([&] {
    const auto older_kernel = [](const seccomp_data& call) {
      return (call.args[1] & 0xFF) == IORING_REGISTER_RING_FDS ? EINVAL : 0;
    };
    if (!testing::intercept_syscalls({SYS_io_uring_register}, older_kernel)) return kSkip;
    return leave_a_child_behind(dir_ / "file", bytes_.size(), false);
  });
  if (status == kSkip) GTEST_SKIP() << "no slots are registered here, or no system calls are to be intercepted";
  EXPECT_EQ(status, 0);
}

// The first load's looks must not make the second one think that all of it is cached.
TEST_F(ConfinedTest, AColdFileOfSomebodyElseIsReadPastTheCacheEveryTime) {
  const auto path = dir_ / "file";
  testing::drop_from_cache(path);
  const int status = run_as_somebody_else([&] {
    Engine engine(small_engine());
    for (int load = 0; load < 2; ++load) {
      GuardedMemory memory(bytes_.size());
      const TransferStats stats = engine.load(request(path, memory));
      if (!right(memory, bytes_)) return 1;
      if (!has(stats.fallback_reason, "cachestat")) return 2;
      if (has(stats.fallback_reason, "taken for not cached")) return kSkip;
      if (stats.buffered_bytes > 2 * kMiB) return 3;  // Of 10 chunks, each wrong by a chance of 1 in 256.
    }
    return 0;
  });
  if (status == kSkip) GTEST_SKIP() << "not root, or a file system without RWF_NOWAIT";
  EXPECT_EQ(status, 0);
}

TEST_F(ConfinedTest, ACachedFileOfSomebodyElseIsReadFromTheCache) {
  const auto path = dir_ / "file";
  const testing::HeldInCache held(path);
  const int status = run_as_somebody_else([&] {
    GuardedMemory memory(bytes_.size());
    const TransferStats stats = Engine(small_engine()).load(request(path, memory));
    if (has(stats.fallback_reason, "taken for not cached")) return kSkip;
    return right(memory, bytes_) && stats.direct_bytes == 0 ? 0 : 1;
  });
  if (status == kSkip) GTEST_SKIP() << "not root, or a file system without RWF_NOWAIT";
  EXPECT_EQ(status, 0);
}

// A sandbox that closes when the ring is there already, before the first load or in the middle of one.
class ClosingSandboxTest : public ConfinedTest, public ::testing::WithParamInterface<std::tuple<int, bool, bool>> {};

INSTANTIATE_TEST_SUITE_P(
    Errors, ClosingSandboxTest,
    ::testing::Combine(::testing::Values(EPERM, ENOSYS, EAGAIN, EBUSY), ::testing::Bool(), ::testing::Bool()),
    [](const auto& part) {
      constexpr auto name = [](int error) {
        return error == EPERM ? "NotPermitted" : error == ENOSYS ? "NoSuchCall" : error == EAGAIN ? "Again" : "Busy";
      };
      return std::string(name(std::get<0>(part.param))) + (std::get<1>(part.param) ? "InTheMiddle" : "") +
             (std::get<2>(part.param) ? "OfEverything" : "");
    });

TEST_P(ClosingSandboxTest, WhatTheKernelDoesNotTakeAnyMoreGoesToTheWorkers) {
  const auto [error_number, in_the_middle, everything] = GetParam();
  const int status = run_in_child([&, error = error_number, middle = in_the_middle, all = everything] {
    Engine engine(small_engine());
    if (engine.options().backend != Backend::kIoUring) return kSkip;
    const auto deny = [&] {
      const auto refuse = [&](unsigned call) {
        return testing::deny_syscall(call, static_cast<unsigned>(error), SECCOMP_FILTER_FLAG_TSYNC);
      };
      return (!all || (refuse(SYS_io_uring_register) && refuse(SYS_io_uring_setup))) && refuse(SYS_io_uring_enter);
    };
    if (!middle && !deny()) return kSkip;
    GuardedMemory first(bytes_.size(), 64);
    Transfer transfer = engine.start_load(request(dir_ / "file", first, CachePolicy::kDirect));
    if (middle && !deny()) return kSkip;
    if (!transfer.wait_for(testing::kHang)) return 3;
    transfer.wait();
    if (!right(first, bytes_)) return 1;
    GuardedMemory second(bytes_.size());
    const TransferStats stats = engine.load(request(dir_ / "file", second, CachePolicy::kDirect));
    if (!right(second, bytes_)) return 1;
    if (!has(stats.fallback_reason, "io_uring_enter") || stats.backend != Backend::kWorkers) return 2;
    return load_at_once(engine, dir_ / "file").backend == Backend::kWorkers ? 0 : 4;
  });
  if (status == kSkip) GTEST_SKIP() << "no seccomp, or no io_uring";
  EXPECT_EQ(status, 0) << "1: wrong bytes, 2: the reason is not told, 3: it hangs, 4: a load that needs no thread says "
                          "that there is a ring, -1: it crashed";
}

// A kernel that is out of memory for a moment is asked again, which is given up after a second.
TEST_F(ConfinedTest, AKernelThatSaysLaterIsNotAskedAgainAndAgainWithoutAPause) {
  const int status = run_in_child([&] {
    std::atomic<int> refused = -1;
    const auto later = [&](const seccomp_data&) { return refused >= 0 && ++refused > 0 ? EAGAIN : 0; };
    if (!testing::intercept_syscalls({SYS_io_uring_enter}, later)) return kSkip;
    Engine engine(small_engine());
    if (engine.options().backend != Backend::kIoUring) return kSkip;
    refused = 0;
    GuardedMemory memory(bytes_.size());
    engine.load(request(dir_ / "file", memory, CachePolicy::kDirect));
    if (!right(memory, bytes_)) return 1;
    return refused > 1 && refused < 2000 ? 0 : 2;
  });
  if (status == kSkip) GTEST_SKIP() << "no seccomp, or no io_uring";
  EXPECT_EQ(status, 0) << "1: wrong bytes, 2: it was asked too often";
}

TEST_F(ConfinedTest, ASandboxThatDeniesOpenAndStatNowAndThenIsACleanErrorOrRightBytes) {
  const int status = run_in_child([&] {
    std::atomic<bool> closed = false;
    std::minstd_rand random(1);  // The thread that answers has it alone.
    const auto now_and_then = [&](const seccomp_data&) {
      return closed && random() % 3 == 0 ? (random() % 2 ? EPERM : ENOSYS) : 0;
    };
    if (!testing::intercept_syscalls({SYS_openat, SYS_statx}, now_and_then)) return kSkip;
    Engine engine(small_engine());
    int good = 0;
    int denied = 0;
    for (int round = 0; round < 40; ++round) {
      std::deque<GuardedMemory> memory;
      std::vector<Transfer> transfers;
      for (std::size_t i = 0; i < 6; ++i) {
        closed = i > 1;
        memory.emplace_back(bytes_.size(), i % 2 * 64);
        transfers.push_back(engine.start_load(request(dir_ / "file", memory.back(), static_cast<CachePolicy>(i % 3))));
      }
      for (std::size_t i = 0; i < transfers.size(); ++i) {
        if (!transfers[i].wait_for(testing::kHang)) return 3;
        const std::error_code error = transfers[i].error();
        if (!error && !right(memory[i], bytes_)) return 1;
        if (error && error != std::errc::operation_not_permitted && error != std::errc::function_not_supported)
          return 2;
        ++(error ? denied : good);
      }
    }
    closed = false;
    GuardedMemory memory(bytes_.size());
    engine.load(request(dir_ / "file", memory));
    if (!right(memory, bytes_)) return 1;
    return good > 0 && denied > 0 ? 0 : 4;
  });
  if (status == kSkip) GTEST_SKIP() << "system calls cannot be intercepted here";
  EXPECT_EQ(status, 0) << "1: wrong bytes, 2: another error, 3: it hangs, 4: nothing was shown, -1: it crashed";
}

}  // namespace
}  // namespace flashpack
