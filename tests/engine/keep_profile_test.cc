#include "engine/tuning/keep_profile.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <string>
#include <vector>

#include "tests/engine/profiles_fixture.h"
#include "tests/support/hang.h"
#include "tests/support/mounts.h"

namespace flashpack {
namespace {

using internal::keep_profile;
using testing::has;
using testing::kMiB;
using testing::options_of;

class KeepProfileTest : public testing::Profiles {};

TEST_F(KeepProfileTest, ALaterProfileTakesThePlaceOfTheEarlierAndLeavesThoseOfOtherDisks) {
  edit("\"storage\":\"[^\"]*\"", "\"storage\":\"another disk\",\"note\":\"by hand\"");
  expect_defaults("no profile in " + profiles_.string() + " is for ");
  keep_profile(dir_.path(), options_of(8 * kMiB, 4, 0), profiles_);
  keep_profile(dir_.path(), options_of(1 * kMiB, 4, 0), profiles_);
  EXPECT_EQ(tuned().options.chunk_bytes, 1 * kMiB);
  EXPECT_TRUE(has(text(), "another disk") && has(text(), "by hand")) << text();
  EXPECT_FALSE(has(text(), std::to_string(8 * kMiB))) << text();
}

TEST_F(KeepProfileTest, OptionsOutOfRangeAreNotKept) {
  for (const EngineOptions& options :
       {options_of(3 * kMiB, 8, 1), options_of(kMiB, 0, 1), options_of(kMiB, 8, 65), options_of(1024 * kMiB, 1, 1),
        options_of(512 * kMiB, 3, 1), options_of(2 * kMiB, 1024, 1)}) {
    EXPECT_THROW(keep_profile(dir_.path(), options, profiles_), Error);
  }
  EXPECT_TRUE(tuned().applied);
}

TEST_F(KeepProfileTest, WhyNoneIsKeptIsKnownBefore) {
  EXPECT_EQ(internal::why_none_is_kept(dir_.path(), {}, profiles_), "");
  EXPECT_EQ(internal::why_none_is_kept(dir_.path(), {}, dir_ / "not/yet/there/tune.json"), "");
  EXPECT_FALSE(std::filesystem::exists(dir_ / "not"));
  EXPECT_TRUE(has(internal::why_none_is_kept("/proc", {}, profiles_), "proc has no disk"));
  EXPECT_TRUE(has(internal::why_none_is_kept(dir_.path(), {}, {}), "HOME"));
  EXPECT_TRUE(has(internal::why_none_is_kept(dir_.path(), {}, profiles_ / "flashpack" / "tune.json"),
                  profiles_.string() + "/flashpack/tune.json cannot be read: "));
  rewrite("{");
  EXPECT_TRUE(has(internal::why_none_is_kept(dir_.path(), {}, profiles_), "is damaged"));
}

TEST_F(KeepProfileTest, APlaceThatCannotBeWrittenIsKnownBefore) {
  const testing::Mount read_only("tmpfs", "tmpfs", dir_ / "read_only", MS_RDONLY, "");
  if (!read_only.refusal().empty()) GTEST_SKIP() << read_only.refusal();
  EXPECT_EQ(internal::why_none_is_kept(dir_.path(), {}, dir_ / "read_only/flashpack/tune.json"),
            (dir_ / "read_only").string() + " cannot be written: Read-only file system");
}

TEST_F(KeepProfileTest, AConfigDirectoryThatCannotBeWrittenIsAnErrorWithItsPathAndLeavesNothing) {
  // A file where the directory should be, which stops root, too.
  const auto blocked = profiles_ / "flashpack" / "tune.json";
  try {
    keep_profile(dir_.path(), {}, blocked);
    FAIL();
  } catch (const Error& error) {
    EXPECT_TRUE(has(error.path().string(), profiles_.string())) << error.what();
  }
  EXPECT_TRUE(tuned().applied);
}

TEST_F(KeepProfileTest, ProcessesThatWriteAtOnceNeverShowAHalfWrittenFileAndLeaveNoOther) {
  const std::string ours = text();
  constexpr int kOthers = 20;
  std::string others;
  for (int i = 0; i < kOthers; ++i) others += "{\"storage\":\"other " + std::to_string(i) + "\"},";
  rewrite("{\"profiles\":[" + others + ours.substr(ours.find('[') + 1));
  std::vector<pid_t> children;
  for (int child = 0; child < 4; ++child) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      bool applied = true;
      for (std::uint32_t i = 1; i <= 25; ++i) {
        keep_profile(dir_.path(), options_of(kMiB, i, 1), profiles_);
        applied = applied && tuned().applied;
      }
      ::_exit(applied ? 0 : 1);
    }
    children.push_back(pid);
  }
  for (const pid_t pid : children) {
    int status = 0;
    ASSERT_EQ(::waitpid(pid, &status, 0), pid);
    EXPECT_EQ(status, 0);
  }
  for (int i = 0; i < kOthers; ++i) EXPECT_TRUE(has(text(), "\"other " + std::to_string(i) + "\"")) << i;
  using Entries = std::filesystem::directory_iterator;
  EXPECT_EQ(std::distance(Entries(profiles_.parent_path()), Entries()), 1);
}

// Whether `pid` waits for a lock, as /proc/locks tells.
bool waits_for_a_lock(pid_t pid) {
  std::ifstream locks("/proc/locks");
  for (std::string line; std::getline(locks, line);) {
    if (std::regex_search(line, std::regex("-> FLOCK .* " + std::to_string(pid) + " "))) return true;
  }
  return false;
}

TEST_F(KeepProfileTest, AWriterWaitsForTheOneBeforeItAndKeepsWhatThatHasAdded) {
  const int lock = ::open(profiles_.parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  ASSERT_EQ(::flock(lock, LOCK_EX), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    keep_profile(dir_.path(), options_of(8 * kMiB, 4, 2), profiles_);
    ::_exit(0);
  }
  int status = -1;
  const auto give_up = std::chrono::steady_clock::now() + testing::kHang;
  pid_t ended = 0;
  while (ended == 0 && !waits_for_a_lock(child) && std::chrono::steady_clock::now() < give_up)
    ended = ::waitpid(child, &status, WNOHANG);
  EXPECT_EQ(ended, 0) << "it did not wait";
  edit("\\[", "[{\"storage\":\"of the first writer\"},");
  ::flock(lock, LOCK_UN);  // The child has the descriptor, too.
  ::close(lock);
  if (ended == 0) ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(has(text(), "of the first writer")) << text();
  EXPECT_EQ(tuned().options.chunk_bytes, 8 * kMiB);
}

}  // namespace
}  // namespace flashpack
