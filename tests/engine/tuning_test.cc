#include "flashpack/tuning.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <regex>
#include <string>
#include <string_view>

#include "flashpack/error.h"
#include "tests/support/gpu_shown.h"
#include "tests/support/hang.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

constexpr std::uint32_t kMiB = 1 << 20;

EngineOptions options_of(std::uint32_t chunk_bytes, std::uint32_t queue_depth, std::uint32_t workers) {
  EngineOptions options;
  options.chunk_bytes = chunk_bytes;
  options.queue_depth = queue_depth;
  options.workers = workers;
  return options;
}

bool has(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

// A directory on a disk that can be recognised, and a file of profiles in it.
class TuningTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ::unsetenv("FLASHPACK_TUNE");
    try {
      keep_profile(dir_.path(), options_of(2 * kMiB, 16, 3), profiles_);
    } catch (const Error& error) {
      GTEST_SKIP() << error.what();
    }
  }
  TunedOptions tuned(Device device = {}) const { return tuned_options(dir_.path(), device, profiles_); }
  std::string text() const {
    const auto bytes = testing::read_file(profiles_);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  void rewrite(std::string_view text) const { testing::write_file(profiles_, std::as_bytes(std::span(text))); }
  void edit(const char* pattern, const std::string& by) const {
    const std::string edited = std::regex_replace(text(), std::regex(pattern), by);
    ASSERT_NE(edited, text()) << pattern;
    rewrite(edited);
  }
  void expect_defaults(std::string_view why, Device device = {}) const {
    const TunedOptions got = tuned(device);
    EXPECT_FALSE(got.applied);
    EXPECT_TRUE(has(got.reason, why)) << got.reason;
    EXPECT_EQ(got.options.chunk_bytes, EngineOptions().chunk_bytes);
    EXPECT_EQ(got.options.queue_depth, EngineOptions().queue_depth);
    EXPECT_EQ(got.options.workers, EngineOptions().workers);
    EXPECT_EQ(got.options.staging_bytes, 0U);
  }

  testing::TempDir dir_;
  std::filesystem::path profiles_ = dir_ / "config/flashpack/tune.json";
};

TEST_F(TuningTest, WhatWasKeptIsAppliedToEveryPathOfThatDisk) {
  for (const auto& path : {dir_.path(), dir_ / "config", dir_ / "not/yet/there"}) {
    const TunedOptions got = tuned_options(path, {}, profiles_);
    EXPECT_TRUE(got.applied) << got.reason;
    EXPECT_EQ(got.options.chunk_bytes, 2 * kMiB);
    EXPECT_EQ(got.options.queue_depth, 16U);
    EXPECT_EQ(got.options.workers, 3U);
    EXPECT_TRUE(has(got.reason, "2 MiB x 16, 3 workers of ")) << got.reason;
  }
}

TEST_F(TuningTest, ALaterProfileTakesThePlaceOfTheEarlierAndLeavesThoseOfOtherDisks) {
  edit("\"storage\":\"[^\"]*\"", "\"storage\":\"another disk\",\"note\":\"by hand\"");
  expect_defaults("no profile is for ");
  keep_profile(dir_.path(), options_of(8 * kMiB, 4, 0), profiles_);
  keep_profile(dir_.path(), options_of(1 * kMiB, 4, 0), profiles_);
  EXPECT_EQ(tuned().options.chunk_bytes, 1 * kMiB);
  EXPECT_TRUE(has(text(), "another disk") && has(text(), "by hand")) << text();
  EXPECT_FALSE(has(text(), std::to_string(8 * kMiB))) << text();
}

TEST_F(TuningTest, AProfileOfAnotherKernelFileSystemOrGpuIsNotApplied) {
  const std::string ours = text();
  for (const std::string name : {"kernel", "file_system", "gpu"}) {
    edit(("\"" + name + "\":\"[^\"]*\"").c_str(), "\"" + name + "\":\"other\"");
    expect_defaults("the profile is for " + name + " \"other\"");
    rewrite(ours);
  }
}

TEST_F(TuningTest, AProfileOfTheHostIsNotAppliedToAGpu) {
  expect_defaults("GPU", {Device::Kind::kCuda, 1});
  EXPECT_EQ(tuned({Device::Kind::kCuda, 1}).options.device.index, 1);
}

TEST_F(TuningTest, DamagedFilesAreIgnoredWithAReasonAndNotReplaced) {
  const std::string half = text().substr(0, text().size() / 2);
  for (const std::string& damaged :
       {half, std::string(), std::string("[]"), std::string("{}"), std::string("\0x", 2),
        std::string("{\"profiles\":{}}"), std::string(100, '['), std::string((1 << 20) + 1, ' ')}) {
    rewrite(damaged);
    expect_defaults("is damaged");
    EXPECT_THROW(keep_profile(dir_.path(), options_of(2 * kMiB, 16, 3), profiles_), Error);
    EXPECT_EQ(text(), damaged);
  }
  std::filesystem::remove(profiles_);
  keep_profile(dir_.path(), options_of(2 * kMiB, 16, 3), profiles_);
  EXPECT_TRUE(tuned().applied);
}

TEST_F(TuningTest, EntriesThatAreNoProfilesAreSkipped) {
  const std::string ours = text();
  rewrite("{\"profiles\":[1,null,[],{},{\"storage\":7}," + ours.substr(ours.find('[') + 1));
  EXPECT_TRUE(tuned().applied) << tuned().reason;
}

TEST_F(TuningTest, ValuesThatAreMissingOfAnotherTypeOrRefusedByTheEngineAreNotApplied) {
  const std::string ours = text();
  for (const auto& [name, values] : std::vector<std::pair<std::string, std::vector<std::string>>>{
           {"chunk_bytes", {"3145728", "0", "-1048576", "524288", "2147483648", "1e300", "\"1048576\"", "null"}},
           {"queue_depth", {"0", "1025", "-1", "1.5", "18446744073709551617", "true"}},
           {"workers", {"65", "-1", "{}"}}}) {
    for (const std::string& value : values) {
      edit(("\"" + name + "\":[0-9]+").c_str(), "\"" + name + "\":" + value);
      expect_defaults("missing or out of range");
      rewrite(ours);
    }
    edit(("\"" + name + "\"").c_str(), "\"x\"");
    expect_defaults("missing or out of range");
    rewrite(ours);
  }
}

TEST_F(TuningTest, TheEngineTakesWhatCanBeKeptAndTheLargestReadsFindRoom) {
  for (const auto& [chunk_mib, depth, workers] :
       {std::array{1U, 1U, 64U}, {64U, 1U, 0U}, {64U, 16U, 1U}, {1U, 1024U, 1U}}) {
    keep_profile(dir_.path(), options_of(chunk_mib * kMiB, depth, workers), profiles_);
    const TunedOptions got = tuned();
    ASSERT_TRUE(got.applied) << got.reason;
    const Engine engine(got.options);
    EXPECT_GE(engine.options().staging_bytes, std::uint64_t{chunk_mib} * kMiB * depth);
  }
}

TEST_F(TuningTest, OptionsOutOfRangeAreNotKept) {
  for (const EngineOptions& options :
       {options_of(3 * kMiB, 8, 1), options_of(kMiB, 0, 1), options_of(kMiB, 8, 65), options_of(1024 * kMiB, 1, 1),
        options_of(512 * kMiB, 3, 1), options_of(2 * kMiB, 1024, 1)}) {
    EXPECT_THROW(keep_profile(dir_.path(), options, profiles_), Error);
  }
  EXPECT_TRUE(tuned().applied);
}

TEST_F(TuningTest, TheSlotsOfAProfileTakeAGigabyteAtMost) {
  for (const auto& [chunk_mib, depth] : {std::pair{1024U, 1U}, {512U, 1U}, {512U, 2U}, {512U, 3U}, {1U, 1024U}}) {
    edit("\"chunk_bytes\":[0-9]+,\"queue_depth\":[0-9]+",
         "\"chunk_bytes\":" + std::to_string(chunk_mib * kMiB) + ",\"queue_depth\":" + std::to_string(depth));
    const TunedOptions got = tuned();
    EXPECT_EQ(got.applied, std::max(depth, 2U) * chunk_mib <= 1024) << chunk_mib << " x " << depth;
    EXPECT_LE(got.options.staging_bytes, std::uint64_t{1024} * kMiB);
  }
}

TEST_F(TuningTest, StagingMemoryIsKeptIfItIsAnotherThanTheProfileWouldHaveWithout) {
  EngineOptions options = options_of(2 * kMiB, 16, 3);
  for (const std::uint64_t staging_mib : {64u, 24u, 96u, 17u, 4u, 1024u}) {
    options.staging_bytes = staging_mib * std::uint64_t{kMiB};
    keep_profile(dir_.path(), options, profiles_);
    EXPECT_EQ(has(text(), "staging_bytes"), staging_mib != 64) << text();
    const TunedOptions got = tuned();
    ASSERT_TRUE(got.applied) << got.reason;
    EXPECT_EQ(got.options.staging_bytes, staging_mib == 64 ? 0 : options.staging_bytes);
    EXPECT_EQ(has(got.reason, "2 MiB x 16, 3 workers, " + std::to_string(staging_mib) + " MiB of staging of "),
              staging_mib != 64)
        << got.reason;
    const Engine engine(got.options);
    EXPECT_EQ(engine.options().staging_bytes, options.staging_bytes);
  }
}

TEST_F(TuningTest, StagingMemoryThatTheReadsInFlightNeedIsNoNumberOfItsOwn) {
  EngineOptions options = options_of(16 * kMiB, 8, 0);
  options.staging_bytes = 128 * kMiB;
  keep_profile(dir_.path(), options, profiles_);
  EXPECT_FALSE(has(text(), "staging_bytes")) << text();
  EXPECT_EQ(tuned().options.staging_bytes, 128 * kMiB);
}

TEST_F(TuningTest, LessStagingMemoryThanTheReadsInFlightIsKept) {
  EngineOptions options = options_of(512 * kMiB, 3, 1);
  options.staging_bytes = 1024 * std::uint64_t{kMiB};
  keep_profile(dir_.path(), options, profiles_);
  EXPECT_EQ(tuned().options.staging_bytes, options.staging_bytes);
}

TEST_F(TuningTest, UsualChunksWithOtherStagingMemoryAreNotTheDefaults) {
  EngineOptions options;
  options.staging_bytes = 32 * kMiB;
  keep_profile(dir_.path(), options, profiles_);
  EXPECT_EQ(tuned().options.staging_bytes, options.staging_bytes);
  options.staging_bytes = 64 * kMiB;
  keep_profile(dir_.path(), options, profiles_);
  expect_defaults("nothing was better than the defaults");
}

TEST_F(TuningTest, StagingMemoryThatTheEngineRefusesOrThatIsTooMuchIsNeitherKeptNorApplied) {
  EngineOptions options = options_of(4 * kMiB, 8, 3);
  for (const std::uint64_t staging_bytes : {7u * kMiB, 1025u * kMiB, 1u}) {
    options.staging_bytes = staging_bytes;
    EXPECT_THROW(keep_profile(dir_.path(), options, profiles_), Error) << staging_bytes;
  }
  options.staging_bytes = 32 * kMiB;
  keep_profile(dir_.path(), options, profiles_);
  const std::string ours = text();
  for (const char* value : {"1", "4194304", "1074790400", "-1", "null", "\"33554432\"", "1.5"}) {
    edit("\"staging_bytes\":[0-9]+", std::string("\"staging_bytes\":") + value);
    expect_defaults("missing or out of range");
    rewrite(ours);
  }
}

TEST_F(TuningTest, AGpuHasAProfileOfItsOwnWithItsOwnUsualStagingMemory) {
  const int status = testing::run_in_child([this] {
    if (!testing::show_gpu("NVIDIA Of The Tests")) return testing::kSkip;
    const Device gpu{Device::Kind::kCuda, 1};
    EngineOptions options = options_of(1 * kMiB, 32, 8);
    options.device = gpu;
    options.staging_bytes = 24 * kMiB;
    keep_profile(dir_.path(), options, profiles_);
    const bool found =
        tuned(gpu).options.staging_bytes == options.staging_bytes && tuned(gpu).options.device.index == 1;
    const bool host_is_left = tuned().options.queue_depth == 16;
    options.staging_bytes = 96 * kMiB;
    keep_profile(dir_.path(), options, profiles_);
    const bool usual = tuned(gpu).applied && tuned(gpu).options.staging_bytes == 0;
    return (found ? 0 : 1) + (host_is_left ? 0 : 2) + (usual ? 0 : 4) + (has(text(), "Of The Tests") ? 0 : 8);
  });
  if (status == testing::kSkip) GTEST_SKIP() << "no mount namespace";
  EXPECT_EQ(status, 0);
}

TEST_F(TuningTest, TheDefaultsAreKeptWithoutNumbersSoThatLaterOnesAreTaken) {
  keep_profile(dir_.path(), EngineOptions(), profiles_);
  expect_defaults("nothing was better than the defaults, says " + profiles_.string());
  EXPECT_FALSE(has(text(), "chunk_bytes") || has(text(), "queue_depth") || has(text(), "workers")) << text();
  for (const char* damaged : {"false", "1", "null"}) {
    edit("\"defaults\":[a-z0-9]+", std::string("\"defaults\":") + damaged);
    expect_defaults("missing or out of range");
  }
}

TEST_F(TuningTest, AFileThatIsMissingOrCannotBeReadIsAReason) {
  std::filesystem::remove(profiles_);
  expect_defaults("there is no ");
  std::filesystem::create_directory(profiles_);
  expect_defaults("cannot be read: Is a directory");
  std::filesystem::remove(profiles_);
  ASSERT_EQ(::mkfifo(profiles_.c_str(), 0600), 0);
  expect_defaults("is damaged");
}

TEST_F(TuningTest, AFileThatCannotBeReadIsNotReplacedAndTheErrorIsTheSystems) {
  std::filesystem::remove(profiles_);
  std::filesystem::create_symlink("tune.json", profiles_);  // Refused to root, too.
  expect_defaults("cannot be read: Too many levels of symbolic links");
  try {
    keep_profile(dir_.path(), options_of(2 * kMiB, 16, 3), profiles_);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), std::errc::too_many_symbolic_link_levels) << error.what();
    EXPECT_EQ(error.path(), profiles_);
  }
  EXPECT_TRUE(std::filesystem::is_symlink(profiles_));
}

TEST_F(TuningTest, MemoryHasNoProfile) {
  EXPECT_TRUE(has(tuned_options("/dev/shm", {}, profiles_).reason, "tmpfs has no disk"));
  EXPECT_THROW(keep_profile("/dev/shm", {}, profiles_), Error);
}

TEST_F(TuningTest, TheEnvironmentTurnsItOff) {
  ::setenv("FLASHPACK_TUNE", "off", 1);
  expect_defaults("FLASHPACK_TUNE=off");
  ::setenv("FLASHPACK_TUNE", "on", 1);
  EXPECT_TRUE(tuned().applied);
  ::unsetenv("FLASHPACK_TUNE");
}

TEST_F(TuningTest, TheFileIsWhereTheEnvironmentSaysAndNowhereWithoutAHome) {
  ::setenv("XDG_CONFIG_HOME", "/x", 1);
  EXPECT_EQ(profiles_path(), "/x/flashpack/tune.json");
  ::setenv("XDG_CONFIG_HOME", "relative", 1);
  ::setenv("HOME", "/h", 1);
  EXPECT_EQ(profiles_path(), "/h/.config/flashpack/tune.json");
  ::unsetenv("XDG_CONFIG_HOME");
  ::unsetenv("HOME");
  EXPECT_EQ(profiles_path(), "");
  EXPECT_TRUE(has(tuned_options(dir_.path()).reason, "HOME"));
  EXPECT_THROW(keep_profile(dir_.path(), {}), Error);
}

TEST_F(TuningTest, AConfigDirectoryThatCannotBeWrittenIsAnErrorWithItsPathAndLeavesNothing) {
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

TEST_F(TuningTest, ALinkToTheFileStaysALink) {
  std::filesystem::rename(profiles_, dir_ / "elsewhere.json");
  std::filesystem::create_symlink(dir_ / "elsewhere.json", profiles_);
  keep_profile(dir_.path(), options_of(kMiB, 1, 1), profiles_);
  EXPECT_TRUE(std::filesystem::is_symlink(profiles_));
  EXPECT_EQ(tuned().options.queue_depth, 1U);
}

TEST_F(TuningTest, ProcessesThatWriteAtOnceNeverShowAHalfWrittenFileAndLeaveNoOther) {
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

TEST_F(TuningTest, AWriterWaitsForTheOneBeforeItAndKeepsWhatThatHasAdded) {
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
