// Saves that the system refuses something.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/crash_rig.h"
#include "tests/support/mounts.h"
#include "tests/support/run.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

using testing::CrashTest;
using testing::file_of;
using testing::kInPlace;
using testing::kMiB;
using testing::kOldKept;
using testing::kSkip;
using testing::outcome_of_save;
using testing::run_in_child;
using testing::save;
using testing::small_engine;

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
       {Case{SYS_fallocate, EOPNOTSUPP}, Case{SYS_fallocate, EINTR}, Case{SYS_flock, EOPNOTSUPP},
        Case{SYS_flock, ENOLCK}, Case{SYS_statx, ENOSYS}, Case{SYS_fsync, EINVAL}}) {
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
            if (!can_reserve) writer.write({.extents = {{0, much.size(), much.data()}}});
          },
          [&] { full.create(path_).write({.extents = {{0, much.size(), much.data()}}}); },
          [&] { full.create(path_).commit(much); }};
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
