#include "flashpack/tuning.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <string>

#include "tests/engine/profiles_fixture.h"
#include "tests/support/gpu_shown.h"
#include "tests/support/sandbox.h"

namespace flashpack {
namespace {

using internal::keep_profile;
using testing::has;
using testing::kMiB;
using testing::options_of;

class TuningTest : public testing::Profiles {};

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

TEST_F(TuningTest, AProfileOfAnotherKernelFileSystemOrGpuIsNotApplied) {
  const std::string ours = text();
  for (const std::string name : {"kernel", "file_system", "gpu"}) {
    edit(("\"" + name + "\":\"[^\"]*\"").c_str(), "\"" + name + "\":\"other\"");
    expect_defaults("the profile in " + profiles_.string() + " is for " + name + " \"other\"");
    rewrite(ours);
  }
}

TEST_F(TuningTest, AProfileThatIsThereAndNotUsedIsToldFromNoneAtAll) {
  EXPECT_EQ(tuned().use, ProfileUse::kUsed);
  const std::string ours = text();
  const auto use_after = [&](const char* pattern, const std::string& by) {
    edit(pattern, by);
    const ProfileUse use = tuned().use;
    rewrite(ours);
    return use;
  };
  EXPECT_EQ(use_after("\"kernel\":\"[^\"]*\"", "\"kernel\":\"other\""), ProfileUse::kIgnored);
  EXPECT_EQ(use_after("\"queue_depth\":16", "\"queue_depth\":0"), ProfileUse::kIgnored);
  EXPECT_EQ(use_after("[^]*", "{"), ProfileUse::kIgnored);
  // Another partition of the disk, and loads to a GPU, have profiles of their own.
  EXPECT_EQ(use_after("\"file_system\":\"[^\"]*\"", "\"file_system\":\"other\""), ProfileUse::kNone);
  EXPECT_EQ(use_after("\"gpu\":\"\"", "\"gpu\":\"other\""), ProfileUse::kNone);
  EXPECT_EQ(use_after("\"storage\":\"[^\"]*\"", "\"storage\":\"other\""), ProfileUse::kNone);
  keep_profile(dir_.path(), {}, profiles_);
  EXPECT_EQ(tuned().use, ProfileUse::kUsed);
  std::filesystem::remove(profiles_);
  EXPECT_EQ(tuned().use, ProfileUse::kNone);
}

TEST_F(TuningTest, AStaleProfileOfTheSameKindIsTheReasonBesideOneOfAnotherKind) {
  const std::string ours = text();
  edit("\\[(\\{.*)\"gpu\":\"\"(.*\\})\\]", "[$1\"gpu\":\"other\"$2,$1\"gpu\":\"\"$2]");
  edit("\"kernel\":\"[^\"]*\"", "\"kernel\":\"old\"");
  expect_defaults("is for kernel \"old\"");
  EXPECT_EQ(tuned().use, ProfileUse::kIgnored);
}

TEST_F(TuningTest, AProfileOfTheHostIsNotAppliedToAGpu) {
  expect_defaults("GPU", {Device::Kind::kCuda, 1});
  EXPECT_EQ(tuned({Device::Kind::kCuda, 1}).options.device.index, 1);
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

}  // namespace
}  // namespace flashpack
