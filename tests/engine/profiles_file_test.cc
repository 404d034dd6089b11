#include "engine/tuning/profiles_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <string>

#include "tests/engine/profiles_fixture.h"

namespace flashpack {
namespace {

using internal::keep_profile;
using testing::kMiB;
using testing::options_of;

class ProfilesFileTest : public testing::Profiles {};

TEST_F(ProfilesFileTest, DamagedFilesAreIgnoredWithAReasonAndNotReplaced) {
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

TEST_F(ProfilesFileTest, EntriesThatAreNoProfilesAreSkipped) {
  const std::string ours = text();
  rewrite("{\"profiles\":[1,null,[],{},{\"storage\":7}," + ours.substr(ours.find('[') + 1));
  EXPECT_TRUE(tuned().applied) << tuned().reason;
}

TEST_F(ProfilesFileTest, AFileThatIsMissingOrCannotBeReadIsAReason) {
  std::filesystem::remove(profiles_);
  expect_defaults("there is no ");
  std::filesystem::create_directory(profiles_);
  expect_defaults("cannot be read: Is a directory");
  std::filesystem::remove(profiles_);
  ASSERT_EQ(::mkfifo(profiles_.c_str(), 0600), 0);
  expect_defaults("is damaged");
}

TEST_F(ProfilesFileTest, AFileThatCannotBeReadIsNotReplacedAndTheErrorIsTheSystems) {
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

TEST_F(ProfilesFileTest, ALinkToTheFileStaysALink) {
  std::filesystem::rename(profiles_, dir_ / "elsewhere.json");
  std::filesystem::create_symlink(dir_ / "elsewhere.json", profiles_);
  keep_profile(dir_.path(), options_of(kMiB, 1, 1), profiles_);
  EXPECT_TRUE(std::filesystem::is_symlink(profiles_));
  EXPECT_EQ(tuned().options.queue_depth, 1U);
}

TEST_F(ProfilesFileTest, TheFileKeepsItsModeAndWhatAKilledWriterLeftIsRemoved) {
  ASSERT_EQ(::chmod(profiles_.c_str(), 0644), 0);
  const auto left = profiles_.parent_path() / ("." + profiles_.filename().string() + ".0123456789abcdef.tmp");
  testing::write_file(left, {});
  keep_profile(dir_.path(), options_of(kMiB, 1, 1), profiles_);
  struct stat status{};
  ASSERT_EQ(::stat(profiles_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0644u);
  EXPECT_FALSE(std::filesystem::exists(left));
}

}  // namespace
}  // namespace flashpack
