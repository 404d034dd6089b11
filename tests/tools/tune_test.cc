#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <string>

#include "bench/support/page_cache.h"
#include "tests/support/run.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

testing::Outcome tune(const std::filesystem::path& dir) {
  return testing::run("'" FLASHPACK_TUNE "' --size_gib 0.02 --rounds 2 --chunk_mib 1 2 --queue_depth 2 4 --dir '" +
                      dir.string() + "' 2>&1");
}

void expect_the_rule_and_one_choice(const testing::Outcome& outcome) {
  EXPECT_EQ(outcome.status, 0) << outcome.output;
  EXPECT_NE(outcome.output.find("within 3 % of the fastest"), std::string::npos) << outcome.output;
  EXPECT_NE(outcome.output.find("best: EngineOptions{.chunk_bytes = "), std::string::npos) << outcome.output;
}

TEST(TuneTool, OnADiskPairsAreCompared) {
  const testing::TempDir dir;
  testing::write_file(dir / "probe", testing::random_bytes(4096));
  if (!bench::try_drop_from_page_cache(dir / "probe")) GTEST_SKIP() << "this file system keeps its pages";
  const testing::Outcome outcome = tune(dir.path());
  expect_the_rule_and_one_choice(outcome);
  EXPECT_NE(outcome.output.find(", .queue_depth = "), std::string::npos) << outcome.output;
}

TEST(TuneTool, WhereAllIsPageCacheChunkSizesAreComparedAndWhatIsMissingIsSaid) {
  const std::filesystem::path dir = "/dev/shm/tune_test." + std::to_string(::getpid());
  std::error_code error;
  if (!std::filesystem::create_directory(dir, error)) GTEST_SKIP() << "no " << dir << ": " << error.message();
  const testing::Outcome outcome = tune(dir);
  EXPECT_TRUE(std::filesystem::is_empty(dir));
  std::filesystem::remove_all(dir);
  expect_the_rule_and_one_choice(outcome);
  EXPECT_NE(outcome.output.find("reads from a disk cannot be measured here"), std::string::npos) << outcome.output;
  EXPECT_EQ(outcome.output.find(".queue_depth"), std::string::npos) << outcome.output;
}

TEST(TuneTool, ADirectoryThatIsNotThereAndNoRoundsAreErrors) {
  const testing::Outcome missing = tune("/no/such/directory");
  EXPECT_EQ(missing.status, 1);
  EXPECT_NE(missing.output.find("/no/such/directory"), std::string::npos) << missing.output;
  EXPECT_NE(testing::run("'" FLASHPACK_TUNE "' --rounds 0 2>&1").status, 0);
}

}  // namespace
}  // namespace flashpack
