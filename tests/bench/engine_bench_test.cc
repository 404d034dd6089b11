#include <gtest/gtest.h>

#include <boost/json/parse.hpp>
#include <set>
#include <string>

#include "tests/support/lies_in_memory.h"
#include "tests/support/run.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

// Rows that need a file of hundreds of MiB are left out, and those that take long.
constexpr const char* kRows =
    "^load/(cold|page_cache)/(touched|fresh|verified|reported|small_one)|^load/half_resident/halves|^store/|"
    "^open/.*/1000/|^plan/|^engine/|^pipeline/|^cost/gap_16_kib";

TEST(EngineBench, RowsOfEachGroupRunAndTheirBytesAreRight) {
  const testing::TempDir dir;
  testing::write_file(dir / "file", testing::random_bytes(4096));
  if (testing::lies_in_memory(dir / "file")) GTEST_SKIP() << "this file system keeps its pages";
  const testing::Outcome outcome =
      testing::run("'" FLASHPACK_ENGINE_BENCH "' --size_gib 0.02 --rounds 1 --dir '" + dir.path().string() +
                   "' --benchmark_format=json --benchmark_filter='" + kRows + "' 2>/dev/null");
  ASSERT_EQ(outcome.status, 0) << outcome.output;
  std::set<std::string> kinds;
  const auto report = boost::json::parse(outcome.output);
  for (const auto& each : report.at("benchmarks").as_array()) {
    const auto& row = each.as_object();
    const std::string name(row.at("name").as_string());
    kinds.insert(name.substr(0, name.find('/')));
    ASSERT_FALSE(row.contains("error_occurred")) << name << ": " << row.at("error_message");
    if (!row.contains("GB/s")) continue;
    EXPECT_GT(row.at("GB/s").to_number<double>(), 0) << name;
    EXPECT_TRUE(row.contains("min_GB/s") && row.contains("max_GB/s")) << name;
  }
  EXPECT_EQ(kinds, (std::set<std::string>{"cost", "engine", "load", "open", "pipeline", "plan", "store"}));
}

}  // namespace
}  // namespace flashpack
