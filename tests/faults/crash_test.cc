// Saves by processes that are killed, and by those whose system calls fail.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/mounts.h"
#include "tests/support/run.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

using testing::run_in_child;

constexpr std::uint32_t kMiB = 1u << 20;

// What a child ends with, beside 0: it has saved.
constexpr int kNotReached = 76;  // There are fewer calls than that.
constexpr int kSkip = 77;
constexpr int kOldKept = 78;  // An error that names path and cause.
constexpr int kInPlace = 79;  // The same, and it says that the new file is in place.
constexpr int kOtherError = 80;

// What creating, writing and committing asks of the kernel, as far as it concerns files.
const std::vector<long> kFileCalls = {
    SYS_openat,    SYS_newfstatat, SYS_fstat,    SYS_statx,  SYS_readlinkat, SYS_getdents64,
    SYS_flock,     SYS_fallocate,  SYS_fchmod,   SYS_fchown, SYS_pwrite64,   SYS_ftruncate,
    SYS_fdatasync, SYS_renameat2,  SYS_renameat, SYS_fsync,  SYS_unlinkat,
#ifdef SYS_readlink  // Not on all machines.
    SYS_readlink,  SYS_rename,     SYS_unlink,   SYS_lstat,  SYS_stat,
#endif
};

std::vector<std::byte> payload_of(unsigned version) {
  return testing::random_bytes(2 * kMiB + 4096 * version + 777, version);
}

std::vector<std::byte> tail_of(unsigned version) { return testing::random_bytes(100 + version, ~version); }

std::vector<std::byte> file_of(unsigned version) {
  auto file = payload_of(version);
  const auto tail = tail_of(version);
  file.insert(file.end(), tail.begin(), tail.end());
  return file;
}

void save(Engine& engine, const std::filesystem::path& path, unsigned version) {
  const auto payload = payload_of(version);
  const std::uint64_t half = kMiB + 4096 + 99;
  FileWriter writer = engine.create(path, {.payload_bytes = payload.size()});
  Transfer first = writer.start_write({{.offset_bytes = 0, .size_bytes = half, .source = payload.data()}});
  writer.write({{.offset_bytes = half, .size_bytes = payload.size() - half, .source = payload.data() + half}});
  first.wait();
  writer.commit(tail_of(version));
}

int outcome_of_save(Engine& engine, const std::filesystem::path& path, unsigned version, int error_number) {
  try {
    save(engine, path, version);
    return 0;
  } catch (const Error& error) {
    const std::string what = error.what();
    const bool complete = error.code() == std::error_code(error_number, std::generic_category()) &&
                          error.path() == path && what.find(path.string()) != std::string::npos &&
                          what.find(std::strerror(error_number)) != std::string::npos;
    if (!complete) {
      std::fprintf(stderr, "%s\n", error.what());
      return kOtherError;
    }
    return what.find("in place, but perhaps not durable") == std::string::npos ? kOldKept : kInPlace;
  }
}

EngineOptions small_engine(Backend backend = Backend::kAuto) {
  return {.chunk_bytes = kMiB, .staging_bytes = 4 * kMiB, .workers = 2, .backend = backend};
}

class CrashTest : public ::testing::Test {
 protected:
  void SetUp() override { testing::write_file(path_, file_of(1)); }

  // None: neither of them, as a whole.
  std::optional<unsigned> version() const {
    const auto bytes = testing::read_file(path_);
    for (const unsigned version : {1u, 2u, 3u}) {
      if (bytes == file_of(version)) return version;
    }
    return std::nullopt;
  }

  std::size_t entries() const {
    return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(dir_.path()), {}));
  }

  int save_in_child(unsigned version) const {
    return run_in_child([&] {
      Engine engine(small_engine());
      return outcome_of_save(engine, path_, version, 0);
    });
  }

  void expect_that_the_next_run_leaves_nothing_but_its_file() const {
    EXPECT_EQ(save_in_child(3), 0);
    EXPECT_EQ(version(), 3u);
    EXPECT_EQ(entries(), 1u);
  }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "model";
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
    writer.write({{.offset_bytes = 0, .size_bytes = payload.size(), .source = payload.data()}});
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

// One system call fails whenever it is made.
class DeniedTest : public CrashTest {
 protected:
  int save_without(long number, int error_number) const {
    return run_in_child([&] {
      Engine engine(small_engine());
      const auto denied = static_cast<unsigned>(number);
      if (!testing::deny_syscall(denied, static_cast<unsigned>(error_number))) return kSkip;
      return outcome_of_save(engine, path_, 2, error_number);
    });
  }
};

TEST_F(DeniedTest, WhenOnlyTheLastSyncFailsTheErrorSaysThatTheNewFileIsInPlace) {
  const int status = save_without(SYS_fsync, EIO);
  if (status == kSkip) GTEST_SKIP() << "seccomp filters are not allowed here";
  EXPECT_EQ(status, kInPlace);
  EXPECT_EQ(version(), 2u);
  EXPECT_EQ(entries(), 1u);
}

TEST_F(DeniedTest, AFileThatCannotBeSyncedDoesNotReplaceAnything) {
  const int status = save_without(SYS_fdatasync, EIO);
  if (status == kSkip) GTEST_SKIP() << "seccomp filters are not allowed here";
  EXPECT_EQ(status, kOldKept);
  EXPECT_EQ(version(), 1u);
  EXPECT_EQ(entries(), 1u);
}

TEST_F(DeniedTest, WhatAFileSystemDoesNotHaveIsDoneWithout) {
  struct Case {
    long number;
    int error_number;
  };
  for (const auto& [number, error_number] :
       {Case{SYS_fallocate, EOPNOTSUPP}, Case{SYS_flock, EOPNOTSUPP}, Case{SYS_flock, ENOLCK}, Case{SYS_statx, ENOSYS},
        Case{SYS_fsync, EINVAL}}) {
    testing::write_file(path_, file_of(1));
    const int status = save_without(number, error_number);
    if (status == kSkip) GTEST_SKIP() << "seccomp filters are not allowed here";
    EXPECT_EQ(status, 0) << number;
    EXPECT_EQ(version(), 2u) << number;
    EXPECT_EQ(entries(), 1u) << number;
  }
}

TEST_F(DeniedTest, WhatIsNeitherReservedNorWrittenReadsAsZeros) {
  const int status = run_in_child([&] {
    Engine engine(small_engine());
    if (!testing::deny_syscall(SYS_fallocate, EOPNOTSUPP)) return kSkip;
    engine.create(path_, {.payload_bytes = 5000}).commit();
    return 0;
  });
  if (status == kSkip) GTEST_SKIP() << "seccomp filters are not allowed here";
  EXPECT_EQ(testing::read_file(path_), std::vector<std::byte>(5000));
}

TEST_F(DeniedTest, WhereNothingCanBeLockedWhatWasLeftStays) {
  testing::write_file(dir_ / ".model.0123456789abcdef.tmp", {});
  const int status = save_without(SYS_flock, EOPNOTSUPP);
  if (status == kSkip) GTEST_SKIP() << "seccomp filters are not allowed here";
  EXPECT_EQ(entries(), 2u) << "it may be somebody's";
}

// Saves by somebody who is not root.
class UnprivilegedTest : public CrashTest {
 protected:
  int save_as_somebody() const {
    ::chown(path_.c_str(), 0, 0);
    return run_in_child([&] {
      if (::geteuid() != 0 || ::setresgid(65534, 65534, 65534) != 0 || ::setresuid(65534, 65534, 65534) != 0)
        return kSkip;
      Engine engine(small_engine());
      return outcome_of_save(engine, path_, 2, EACCES);
    });
  }
};

TEST_F(UnprivilegedTest, ADirectoryThatMayNotBeWrittenToIsAnErrorAtOnce) {
  ::chmod(dir_.path().c_str(), 0755);
  const int status = save_as_somebody();
  if (status == kSkip) GTEST_SKIP() << "not root";
  EXPECT_EQ(status, kOldKept);
  EXPECT_EQ(version(), 1u);
  EXPECT_EQ(entries(), 1u);
}

TEST_F(UnprivilegedTest, AGroupThatCannotBeKeptGivesItsRightsToNoOtherOne) {
  ::chmod(dir_.path().c_str(), 0777);
  ::chmod(path_.c_str(), 0664);
  const int status = save_as_somebody();
  if (status == kSkip) GTEST_SKIP() << "not root";
  EXPECT_EQ(status, 0);
  EXPECT_EQ(version(), 2u);
  struct stat access{};
  ASSERT_EQ(::stat(path_.c_str(), &access), 0);
  EXPECT_EQ(access.st_gid, 65534u);
  EXPECT_EQ(access.st_mode & 07777, 0644u);
}

// Disks that are full, in the file system's view or only in the block layer's.
class FullDiskTest : public CrashTest, public ::testing::WithParamInterface<Backend> {
 protected:
  FullDiskTest() { path_ = dir_ / "disk" / "model"; }
  void SetUp() override {}  // The disk is not there yet.

  static Engine engine() { return Engine(small_engine(GetParam())); }

  // 0 where the error is one of those and the old file is there; else what is wrong.
  int fails(const std::vector<int>& expected, const std::function<void()>& save_too_much) const {
    try {
      save_too_much();
      return 1;
    } catch (const Error& error) {
      const bool right = std::find(expected.begin(), expected.end(), error.code().value()) != expected.end();
      if (right && error.path() == path_ && version() == 1) return 0;
      std::fprintf(stderr, "%s\n", error.what());
      return 2;
    }
  }
};

INSTANTIATE_TEST_SUITE_P(Backends, FullDiskTest, ::testing::Values(Backend::kAuto, Backend::kWorkers),
                         [](const auto& backend) { return backend.param == Backend::kAuto ? "Auto" : "Workers"; });

TEST_P(FullDiskTest, WhatDoesNotFitIsAnErrorAndItsSpaceIsGivenBack) {
  const testing::Mount mount("tmpfs", "tmpfs", path_.parent_path(), 0, "size=8m");
  if (!mount.refusal().empty()) GTEST_SKIP() << mount.refusal();
  testing::write_file(path_, file_of(1));
  const auto much = testing::random_bytes(9 * kMiB);
  for (const bool can_reserve : {true, false}) {
    const int status = run_in_child([&] {
      if (!can_reserve && !testing::deny_syscall(SYS_fallocate, EOPNOTSUPP)) return kSkip;
      Engine full = engine();
      const std::vector<std::function<void()>> ways = {
          [&] {
            FileWriter writer = full.create(path_, {.payload_bytes = much.size()});
            // Where space can be reserved, it is an error already.
            if (!can_reserve) writer.write({{0, much.size(), much.data()}});
          },
          [&] { full.create(path_).write({{0, much.size(), much.data()}}); }, [&] { full.create(path_).commit(much); }};
      for (const auto& way : ways) {
        if (const int wrong = fails({ENOSPC}, way)) return wrong;
      }
      return outcome_of_save(full, path_, 1, 0);
    });
    if (status == kSkip) GTEST_SKIP() << "seccomp filters are not allowed here";
    EXPECT_EQ(status, 0) << can_reserve;
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(path_.parent_path()), {}), 1);
  }
}

// A disk that has promised more than it can keep: writes fail that the file system has found a place for. Those past
// the page cache fail themselves; of those through it, only the sync tells.
TEST_P(FullDiskTest, ADiskThatCannotTakeWhatItIsGivenIsAnErrorWithAndWithoutThePageCache) {
  const testing::Mount backing("tmpfs", "tmpfs", dir_ / "backing", 0, "size=12m");
  if (!backing.refusal().empty()) GTEST_SKIP() << backing.refusal();
  const std::string image = dir_ / "backing" / "image";
  const std::string at = path_.parent_path();
  std::filesystem::create_directory(at);
  const auto made = testing::run("truncate -s 64M " + image + " && mkfs.ext4 -q -b 4096 -N 64 " +
                                 "-E lazy_itable_init=0 -O ^has_journal " + image + " 2>&1 && mount -o loop " + image +
                                 " " + at + " 2>&1 && rmdir " + at + "/lost+found");
  if (made.status != 0) GTEST_SKIP() << "no loop device: " << made.output;
  testing::write_file(path_, file_of(1));
  testing::run("sync -f " + path_.string() + "; dd if=/dev/zero of=" + image + ".rest bs=64k 2>&1");
  bool intercepted = true;
  for (const bool direct : {true, false}) {
    const int status = run_in_child([&] {
      const auto refuse_direct = [&](const seccomp_data& call) { return call.args[2] & O_DIRECT ? EINVAL : 0; };
      if (!direct && !testing::intercept_syscalls({SYS_openat}, refuse_direct)) return kSkip;
      Engine full = engine();
      return fails({ENOSPC, EIO}, [&] { save(full, path_, 2); });
    });
    intercepted = status != kSkip;
    if (intercepted) {
      EXPECT_EQ(status, 0) << direct;
    }
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(at), {}), 1);
  }
  std::filesystem::remove(image + ".rest");
  EXPECT_EQ(save_in_child(3), 0);
  EXPECT_EQ(version(), 3u);
  testing::run("umount -l " + at);
  if (!intercepted) GTEST_SKIP() << "system calls cannot be intercepted here";
}

TEST_P(FullDiskTest, AReadOnlyFileSystemIsAnErrorAtOnce) {
  const testing::Mount mount("tmpfs", "tmpfs", path_.parent_path(), 0, "size=8m");
  if (!mount.refusal().empty()) GTEST_SKIP() << mount.refusal();
  testing::write_file(path_, file_of(1));
  ASSERT_EQ(::mount("", path_.parent_path().c_str(), "", MS_REMOUNT | MS_RDONLY, ""), 0);
  Engine unwritable = engine();
  EXPECT_EQ(fails({EROFS}, [&] { (void)unwritable.create(path_); }), 0);
}

}  // namespace
}  // namespace flashpack
