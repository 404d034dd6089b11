// Saves by processes that are killed, and by those whose system calls fail at one step.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/crash_rig.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

using testing::CrashTest;
using testing::file_of;
using testing::kInPlace;
using testing::kNotReached;
using testing::kOldKept;
using testing::kSkip;
using testing::outcome_of_save;
using testing::payload_of;
using testing::run_in_child;
using testing::save;
using testing::small_engine;
using testing::tail_of;

// What creating, writing and committing asks of the kernel, as far as it concerns files.
const std::vector<long> kFileCalls = {
    SYS_openat,    SYS_newfstatat, SYS_fstat,    SYS_statx,  SYS_readlinkat, SYS_getdents64,
    SYS_flock,     SYS_fallocate,  SYS_fchmod,   SYS_fchown, SYS_pwrite64,   SYS_ftruncate,
    SYS_fdatasync, SYS_renameat2,  SYS_renameat, SYS_fsync,  SYS_unlinkat,
#ifdef SYS_readlink  // Not on all machines.
    SYS_readlink,  SYS_rename,     SYS_unlink,   SYS_lstat,  SYS_stat,
#endif
};

// Whose calls: of the thread that calls, after the engine's start; or the writes of the workers.
class EachStepTest : public CrashTest, public ::testing::WithParamInterface<bool> {
 protected:
  // Saves version 2 in a child in which `answer` is asked about each call. It gets the number of the call, from 0.
  int save_with(const std::function<int(unsigned call)>& answer, int error_number, unsigned last_call) const {
    return run_in_child([&] {
      std::atomic<unsigned> calls = 0;
      const bool of_workers = GetParam();
      const auto& numbers = of_workers ? std::vector<long>{SYS_pwrite64} : kFileCalls;
      const auto intercept = [&] {
        return testing::intercept_syscalls(numbers, [&](const seccomp_data&) { return answer(calls++); });
      };
      if (of_workers && !intercept()) return kSkip;
      Engine engine(small_engine(of_workers ? Backend::kWorkers : Backend::kAuto));
      if (!of_workers && !intercept()) return kSkip;
      const int outcome = outcome_of_save(engine, path_, 2, error_number);
      return calls <= last_call ? kNotReached : outcome;
    });
  }
};

INSTANTIATE_TEST_SUITE_P(Calls, EachStepTest, ::testing::Bool(),
                         [](const auto& calls) { return calls.param ? "WritesOfWorkers" : "OfTheCaller"; });

TEST_P(EachStepTest, AKillLeavesTheOldFileOrTheNewOneAndTheNextRunCleansUp) {
  unsigned step = 0;
  unsigned last_version = 1;
  for (;; ++step) {
    testing::write_file(path_, file_of(1));
    testing::write_file(dir_ / ".model.0123456789abcdef.tmp", {});
    const auto kill_at_step = [step](unsigned call) { return call == step ? ::kill(::getpid(), SIGKILL) : 0; };
    const int status = save_with(kill_at_step, 0, step);
    if (status == kSkip) GTEST_SKIP() << "seccomp cannot notify here";
    if (status == kNotReached) break;
    ASSERT_EQ(status, -1);
    ASSERT_TRUE(version()) << "step " << step;
    EXPECT_GE(*version(), last_version) << "step " << step;
    last_version = *version();
    expect_that_the_next_run_leaves_nothing_but_its_file();
  }
  EXPECT_GE(step, GetParam() ? 4u : 15u);
  EXPECT_EQ(last_version, GetParam() ? 1u : 2u);
}

TEST_P(EachStepTest, AnErrorIsReportedAndLeavesTheOldFileOrTheNewOneAndNothingElse) {
  for (const int error_number : {EIO, ENOSPC, EDQUOT, EINTR}) {
    for (unsigned step = 0;; ++step) {
      testing::write_file(path_, file_of(1));
      const int status = save_with([=](unsigned call) { return call == step ? error_number : 0; }, error_number, step);
      if (status == kSkip) GTEST_SKIP() << "seccomp cannot notify here";
      if (status == kNotReached) break;
      ASSERT_TRUE(status == 0 || status == kOldKept || status == kInPlace)
          << status << " " << std::strerror(error_number) << " at step " << step;
      EXPECT_EQ(version(), status == kOldKept ? 1u : 2u) << std::strerror(error_number) << " at step " << step;
      EXPECT_EQ(entries(), 1u) << std::strerror(error_number) << " at step " << step;
    }
  }
}

TEST_P(EachStepTest, ADiskThatFailsForGoodLeavesTheOldFileOrTheNewOneAndTheNextRunCleansUp) {
  unsigned step = 0;
  for (;; ++step) {
    testing::write_file(path_, file_of(1));
    const int status = save_with([=](unsigned call) { return call >= step ? EIO : 0; }, EIO, step);
    if (status == kSkip) GTEST_SKIP() << "seccomp cannot notify here";
    if (status == kNotReached) break;
    ASSERT_TRUE(status == kOldKept || status == kInPlace) << status << " at step " << step;
    EXPECT_EQ(version(), status == kOldKept ? 1u : 2u) << "step " << step;
    EXPECT_LE(entries(), 2u) << "step " << step;
    expect_that_the_next_run_leaves_nothing_but_its_file();
  }
}

TEST_F(CrashTest, KillsAtRandomMomentsLeaveOneOfTheVersionsAndTheNextRunCleansUp) {
  std::mt19937_64 random(5);
  for (int kill = 0; kill < 100; ++kill) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      const Backend backend = kill % 2 ? Backend::kWorkers : Backend::kAuto;
      Engine engine(small_engine(backend));
      for (unsigned i = 0;; ++i) save(engine, path_, 1 + i % 3);
    }
    ::usleep(static_cast<useconds_t>(random() % 40'000));
    ::kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "it ended by itself";
    ASSERT_TRUE(version()) << "kill " << kill;
    ASSERT_LE(entries(), 2u) << "what the last one left, at most";
  }
  expect_that_the_next_run_leaves_nothing_but_its_file();
}

TEST_F(CrashTest, WhatALivingProcessWritesIsLeftToIt) {
  int ready[2];
  int go_on[2];
  ASSERT_EQ(::pipe(ready), 0);
  ASSERT_EQ(::pipe(go_on), 0);
  const pid_t other = ::fork();
  if (other == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    Engine engine(small_engine());
    const auto payload = payload_of(2);
    FileWriter writer = engine.create(path_, {.payload_bytes = payload.size()});
    char byte = 0;
    if (::write(ready[1], &byte, 1) != 1 || ::read(go_on[0], &byte, 1) != 1) ::_exit(1);
    writer.write({.extents = {{.offset_bytes = 0, .size_bytes = payload.size(), .source = payload.data()}}});
    writer.commit(tail_of(2));
    ::_exit(0);
  }
  ::close(ready[1]);
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  EXPECT_EQ(save_in_child(3), 0);
  EXPECT_EQ(version(), 3u);
  EXPECT_EQ(entries(), 2u);
  ASSERT_EQ(::write(go_on[1], &byte, 1), 1);
  int status = 0;
  ASSERT_EQ(::waitpid(other, &status, 0), other);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(version(), 2u);
  EXPECT_EQ(entries(), 1u);
  for (const int fd : {ready[0], go_on[0], go_on[1]}) ::close(fd);
}

// Between the creation of a file and its lock another writer takes it for one that was left. It has removed it when the
// lock is tried, or holds the lock then and removes it later.
TEST_F(CrashTest, AFileThatIsTakenForALeftoverBeforeItIsLockedIsMadeAgain) {
  for (const bool removed_later : {true, false}) {
    testing::write_file(path_, file_of(1));
    const int status = run_in_child([&] {
      std::vector<std::filesystem::path> taken;
      const auto other_writer = [&](const seccomp_data& call) {
        const bool first = taken.empty();
        for (const auto& entry : std::filesystem::directory_iterator(dir_.path())) {
          if (first && entry.path().extension() == ".tmp") taken.push_back(entry.path());
        }
        if (first && removed_later) return EWOULDBLOCK;
        if (first || call.nr != SYS_flock) std::filesystem::remove(taken.front());
        return 0;
      };
      Engine engine(small_engine());
      if (!testing::intercept_syscalls({SYS_flock, SYS_renameat, SYS_renameat2}, other_writer)) return kSkip;
      return outcome_of_save(engine, path_, 2, 0);
    });
    if (status == kSkip) GTEST_SKIP() << "seccomp cannot notify here";
    EXPECT_EQ(status, 0) << removed_later;
    EXPECT_EQ(version(), 2u);
    EXPECT_EQ(entries(), 1u);
  }
}

TEST_F(CrashTest, WhatReplacesTheOldFileIsSyncedWhenItIsCompleteAndLockedUntilItIsInPlace) {
  ASSERT_EQ(::chmod(path_.c_str(), 0640), 0);
  const int status = run_in_child([&] {
    bool synced = false;
    bool locked = false;
    bool in_place = false;
    const auto look = [&](const seccomp_data& call) {
      in_place = call.nr == SYS_fsync && version() == 2u;
      for (const auto& entry : std::filesystem::directory_iterator(dir_.path())) {
        if (entry.path().extension() != ".tmp") continue;
        struct stat access{};
        ::stat(entry.path().c_str(), &access);
        if (call.nr == SYS_fdatasync)
          synced = testing::read_file(entry.path()) == file_of(2) && (access.st_mode & 0777) == 0640;
        const int other = ::open(entry.path().c_str(), O_RDONLY | O_CLOEXEC);
        locked = ::flock(other, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
        ::close(other);
      }
      return 0;
    };
    Engine engine(small_engine());
    if (!testing::intercept_syscalls({SYS_fdatasync, SYS_renameat, SYS_renameat2, SYS_fsync}, look)) return kSkip;
    const int outcome = outcome_of_save(engine, path_, 2, 0);
    return synced && locked && in_place ? outcome : 1;
  });
  if (status == kSkip) GTEST_SKIP() << "seccomp cannot notify here";
  EXPECT_EQ(status, 0);
}

TEST_F(CrashTest, WhatWasLeftIsRemovedWhereOnlyWhatIsOpenForWritingCanBeLocked) {
  const auto left = dir_ / ".model.0123456789abcdef.tmp";
  testing::write_file(left, {});
  const int status = run_in_child([&] {
    const auto refuse_to_read = [&](const seccomp_data& call) {
      const bool opens_it = reinterpret_cast<const char*>(call.args[1]) == left.filename();
      return opens_it && (call.args[2] & O_ACCMODE) == O_RDONLY ? EACCES : 0;
    };
    Engine engine(small_engine());
    if (!testing::intercept_syscalls({SYS_openat}, refuse_to_read)) return kSkip;
    return outcome_of_save(engine, path_, 2, 0);
  });
  if (status == kSkip) GTEST_SKIP() << "seccomp cannot notify here";
  EXPECT_EQ(status, 0);
  EXPECT_EQ(entries(), 1u);
}

// Of somebody else in a directory like /tmp, under fs.protected_symlinks.
TEST_F(CrashTest, ALinkThatTheKernelDoesNotFollowIsNotFollowed) {
  const auto link = dir_ / "link";
  std::filesystem::create_symlink("model", link);
  const int status = run_in_child([&] {
    const auto protect_link = [&](const seccomp_data& call) {
      const bool follows_it =
          reinterpret_cast<const char*>(call.args[1]) == link && (call.args[3] & AT_SYMLINK_NOFOLLOW) == 0;
      return follows_it ? EACCES : 0;
    };
    Engine engine(small_engine());
    if (!testing::intercept_syscalls({SYS_newfstatat}, protect_link)) return kSkip;
    return outcome_of_save(engine, link, 2, EACCES);
  });
  if (status == kSkip) GTEST_SKIP() << "seccomp cannot notify here";
  EXPECT_EQ(status, kOldKept);
  EXPECT_EQ(version(), 1u);
}

TEST_F(CrashTest, ASignalInTheMiddleOfACallIsNoError) {
  for (const long number : {SYS_flock, SYS_fallocate, SYS_pwrite64, SYS_ftruncate, SYS_fdatasync, SYS_fsync}) {
    testing::write_file(path_, file_of(1));
    const int status = run_in_child([&] {
      unsigned calls = 0;
      Engine engine(small_engine());
      if (!testing::intercept_syscalls({number}, [&](const seccomp_data&) { return calls++ < 2 ? EINTR : 0; }))
        return kSkip;
      const int outcome = outcome_of_save(engine, path_, 2, 0);
      return calls < 3 ? kNotReached : outcome;
    });
    if (status == kSkip) GTEST_SKIP() << "seccomp cannot notify here";
    EXPECT_EQ(status, 0) << number;
    EXPECT_EQ(version(), 2u) << number;
  }
}

}  // namespace
}  // namespace flashpack
