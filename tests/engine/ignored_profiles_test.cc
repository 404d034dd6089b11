#include "engine/tuning/ignored_profiles.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/engine/profiles_fixture.h"
#include "tests/support/gpu_shown.h"
#include "tests/support/sandbox.h"

namespace flashpack {
namespace {

using internal::ignored_profiles;
using testing::has;
using testing::kMiB;
using testing::options_of;

class IgnoredProfilesTest : public testing::Profiles {
 protected:
  std::vector<std::string> ignored() const { return ignored_profiles(dir_.path(), profiles_); }
};

TEST_F(IgnoredProfilesTest, AProfileThatIsAppliedIsNotIgnoredAndThoseOfOtherDisksAreNoConcern) {
  EXPECT_TRUE(ignored().empty());
  edit("\"storage\":\"[^\"]*\"", "\"storage\":\"another disk\"");
  EXPECT_TRUE(ignored().empty());
  rewrite("{\"profiles\":[1,null,[],{},{\"storage\":7}]}");
  EXPECT_TRUE(ignored().empty());
  rewrite("{");
  EXPECT_TRUE(ignored().empty());
  EXPECT_TRUE(ignored_profiles("/dev/shm", profiles_).empty());
}

TEST_F(IgnoredProfilesTest, AProfileOfAnotherKernelFileSystemOrGpuIsToldWithItsValuesAndTheReason) {
  const std::string ours = text();
  for (const std::string name : {"kernel", "file_system", "gpu"}) {
    edit(("\"" + name + "\":\"[^\"]*\"").c_str(), "\"" + name + "\":\"other\"");
    const auto all = ignored();
    ASSERT_EQ(all.size(), 1U) << name;
    EXPECT_TRUE(has(all.front(), "2 MiB x 16, 3 workers for " + name + " \"other\", and here it is ")) << all.front();
    rewrite(ours);
  }
}

TEST_F(IgnoredProfilesTest, ValuesThatCouldNotBeAppliedAndTheDefaultsAreCalledSo) {
  internal::keep_profile(dir_.path(), EngineOptions(), profiles_);
  edit("\"kernel\":\"[^\"]*\"", "\"kernel\":\"other\"");
  EXPECT_TRUE(has(ignored().at(0), "the defaults for kernel \"other\"")) << ignored().at(0);
  edit("\"defaults\":true", "\"workers\":-1");
  EXPECT_TRUE(has(ignored().at(0), "missing or out of range for kernel")) << ignored().at(0);
}

TEST_F(IgnoredProfilesTest, TheProfileOfTheGpusHereIsNotIgnoredBesideThatOfTheHostAndThatOfAnotherOneIs) {
  const int status = testing::run_in_child([this] {
    if (!testing::show_gpu("NVIDIA Of The Tests")) return testing::kSkip;
    EngineOptions options = options_of(1 * kMiB, 32, 8);
    options.device.kind = Device::Kind::kCuda;
    internal::keep_profile(dir_.path(), options, profiles_);
    const bool none = ignored().empty();
    edit("\"gpu\":\"NVIDIA Of The Tests\"", "\"gpu\":\"NVIDIA Of Another Day\"");
    const auto all = ignored();
    const bool told = all.size() == 1 && has(all.front(), "for gpu \"NVIDIA Of Another Day\", and here it is \"NVIDIA");
    return (none ? 0 : 1) + (told ? 0 : 2);
  });
  if (status == testing::kSkip) GTEST_SKIP() << "no mount namespace";
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace flashpack
