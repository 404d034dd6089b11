#include "flashpack/detail/owner_process.h"

#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "flashpack/error.h"
#include "tests/support/sandbox.h"

namespace flashpack::detail {
namespace {

using testing::kSkip;
using testing::run_in_child;

// Whether each of the processes, of which each is a child of the one before, owns only its own object.
int each_owns_its_own(std::vector<OwnerProcess> of_others = {}) {
  for (const OwnerProcess& other : of_others) {
    if (other.is_current()) return 1;
  }
  const OwnerProcess own;
  of_others.push_back(own);
  if (!own.is_current()) return 2;
  return of_others.size() == 3 ? 0 : run_in_child([&] { return each_owns_its_own(of_others); });
}

TEST(OwnerProcessTest, EachOfAProcessItsChildAndGrandchildOwnsWhatItMade) { EXPECT_EQ(each_owns_its_own(), 0); }

TEST(OwnerProcessTest, AChildOfABareCloneIsNoOwnerAlthoughNoHandlerIsCalledForIt) {
  const OwnerProcess owner;
  const long child = ::syscall(SYS_clone, SIGCHLD, nullptr, nullptr, nullptr, nullptr);
  if (child == 0) ::_exit(owner.is_current() ? 1 : 0);
  int status = 0;
  ASSERT_EQ(::waitpid(static_cast<pid_t>(child), &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(OwnerProcessTest, AChildWithThePidOfItsParentIsNoOwner) {
  const OwnerProcess owner;
  const int status = testing::run_in_child_with_same_pid([&] { return owner.is_current() ? 1 : 0; });
  if (status == kSkip) GTEST_SKIP() << "no child can have the pid of its parent here";
  EXPECT_EQ(status, 0);
}

TEST(OwnerProcessTest, ThreadsOfOneProcessAgreeAlsoInAChildThatHasJustBegun) {
  const auto numbers_agree = [] {
    std::array<std::uint64_t, 4> numbers{};
    {
      std::vector<std::jthread> threads;
      for (std::uint64_t& number : numbers) threads.emplace_back([&number] { number = process_number(); });
    }
    return std::set(numbers.begin(), numbers.end()).size() == 1 ? 0 : 1;
  };
  for (int round = 0; round < 20; ++round) ASSERT_EQ(run_in_child(numbers_agree), 0);
}

TEST(OwnerProcessTest, UseInAForkedChildIsAnErrorThatNamesTheObject) {
  const OwnerProcess owner;
  EXPECT_NO_THROW(owner.require_current("engine"));
  const int status = run_in_child([&] {
    try {
      owner.require_current("engine");
    } catch (const Error& error) {
      return error.code() == Errc::kUnusable && std::string(error.what()).starts_with("engine of the parent") ? 0 : 2;
    }
    return 1;
  });
  EXPECT_EQ(status, 0);
}

TEST(OwnerProcessTest, WhatIsLeftToTheParentIsNotDestroyed) {
  const auto shared = std::make_shared<int>();
  auto* const object = new std::shared_ptr<int>(shared);
  std::unique_ptr<std::shared_ptr<int>> pointer(object);
  leave_to_parent(pointer);
  EXPECT_FALSE(pointer);
  EXPECT_EQ(shared.use_count(), 2);
  delete object;
}

// As the kernel of gVisor does. False where no filter is allowed.
bool refuse_to_wipe_pages() {
  sock_filter program[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                           BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_madvise, 0, 3),
                           BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[2])),
                           BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MADV_WIPEONFORK, 0, 1),
                           BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EINVAL),
                           BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  const sock_fprog filter{6, program};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

// The program is started again, because the library has asked the kernel already.
TEST(OwnerProcessTest, WhereTheKernelWipesNoPagesAForkedChildIsNoOwnerEither) {
  const int status = run_in_child([] {
    if (!refuse_to_wipe_pages()) return kSkip;
    ::execl("/proc/self/exe", "owner_process_test", "--gtest_brief=1",
            "--gtest_filter=OwnerProcessTest.Each*:OwnerProcessTest.AChildWith*:OwnerProcessTest.Threads*", nullptr);
    return 1;
  });
  if (status == kSkip) GTEST_SKIP() << "no filter of system calls is allowed here";
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace flashpack::detail
