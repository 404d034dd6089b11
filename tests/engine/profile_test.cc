#include "engine/tuning/profile.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "tests/engine/profiles_fixture.h"

namespace flashpack {
namespace {

using internal::keep_profile;
using testing::has;
using testing::kMiB;
using testing::options_of;

class ProfileTest : public testing::Profiles {};

TEST_F(ProfileTest, ValuesThatAreMissingOfAnotherTypeOrRefusedByTheEngineAreNotApplied) {
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

TEST_F(ProfileTest, TheSlotsOfAProfileTakeAGigabyteAtMost) {
  for (const auto& [chunk_mib, depth] : {std::pair{1024U, 1U}, {512U, 1U}, {512U, 2U}, {512U, 3U}, {1U, 1024U}}) {
    edit("\"chunk_bytes\":[0-9]+,\"queue_depth\":[0-9]+",
         "\"chunk_bytes\":" + std::to_string(chunk_mib * kMiB) + ",\"queue_depth\":" + std::to_string(depth));
    const TunedOptions got = tuned();
    EXPECT_EQ(got.applied, std::max(depth, 2U) * chunk_mib <= 1024) << chunk_mib << " x " << depth;
    EXPECT_LE(got.options.staging_bytes, std::uint64_t{1024} * kMiB);
  }
}

TEST_F(ProfileTest, StagingMemoryIsKeptIfItIsAnotherThanTheProfileWouldHaveWithout) {
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

TEST_F(ProfileTest, StagingMemoryThatTheReadsInFlightNeedIsNoNumberOfItsOwn) {
  EngineOptions options = options_of(16 * kMiB, 8, 0);
  options.staging_bytes = 128 * kMiB;
  keep_profile(dir_.path(), options, profiles_);
  EXPECT_FALSE(has(text(), "staging_bytes")) << text();
  EXPECT_EQ(tuned().options.staging_bytes, 128 * kMiB);
}

TEST_F(ProfileTest, LessStagingMemoryThanTheReadsInFlightIsKept) {
  EngineOptions options = options_of(512 * kMiB, 3, 1);
  options.staging_bytes = 1024 * std::uint64_t{kMiB};
  keep_profile(dir_.path(), options, profiles_);
  EXPECT_EQ(tuned().options.staging_bytes, options.staging_bytes);
}

TEST_F(ProfileTest, UsualChunksWithOtherStagingMemoryAreNotTheDefaults) {
  EngineOptions options;
  options.staging_bytes = 32 * kMiB;
  keep_profile(dir_.path(), options, profiles_);
  EXPECT_EQ(tuned().options.staging_bytes, options.staging_bytes);
  options.staging_bytes = 64 * kMiB;
  keep_profile(dir_.path(), options, profiles_);
  expect_defaults("nothing was better than the defaults");
}

TEST_F(ProfileTest, StagingMemoryThatTheEngineRefusesOrThatIsTooMuchIsNeitherKeptNorApplied) {
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

TEST_F(ProfileTest, TheDefaultsAreKeptWithoutNumbersSoThatLaterOnesAreTaken) {
  keep_profile(dir_.path(), EngineOptions(), profiles_);
  expect_defaults("nothing was better than the defaults, says " + profiles_.string());
  EXPECT_FALSE(has(text(), "chunk_bytes") || has(text(), "queue_depth") || has(text(), "workers")) << text();
  for (const char* damaged : {"false", "1", "null"}) {
    edit("\"defaults\":[a-z0-9]+", std::string("\"defaults\":") + damaged);
    expect_defaults("missing or out of range");
  }
}

TEST_F(ProfileTest, TheWorkersAreKeptAsTheBackendAndAppliedEvenWithOtherwiseUsualOptions) {
  EngineOptions options;
  options.backend = Backend::kWorkers;
  keep_profile(dir_.path(), options, profiles_);
  EXPECT_TRUE(has(text(), "\"backend\":\"workers\"")) << text();
  const TunedOptions got = tuned();
  ASSERT_TRUE(got.applied) << got.reason;
  EXPECT_EQ(got.options.backend, Backend::kWorkers);
  EXPECT_TRUE(has(got.reason, "4 MiB x 8, reads by the workers of ")) << got.reason;
  const Engine engine(got.options);
  EXPECT_EQ(engine.options().backend, Backend::kWorkers);
}

TEST_F(ProfileTest, ABackendThatASystemMayRefuseIsNeitherKeptNorApplied) {
  EXPECT_FALSE(has(text(), "backend")) << text();
  EXPECT_EQ(tuned().options.backend, Backend::kAuto);
  for (const Backend backend : {Backend::kIoUring, Backend::kPlainIoUring}) {
    EngineOptions options = options_of(2 * kMiB, 16, 3);
    options.backend = backend;
    EXPECT_THROW(keep_profile(dir_.path(), options, profiles_), Error);
  }
  const std::string ours = text();
  for (const char* value : {"\"io_uring\"", "\"plain io_uring\"", "\"\"", "3", "null"}) {
    edit("\"workers\":", std::string("\"backend\":") + value + ",\"workers\":");
    expect_defaults("missing or out of range");
    rewrite(ours);
  }
}

}  // namespace
}  // namespace flashpack
