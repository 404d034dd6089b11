#include "tools/tune/decide.h"

#include <gtest/gtest.h>

#include <vector>

#include "tests/support/units.h"

namespace flashpack::bench {
namespace {

using testing::kMiB;

constexpr Setting kByWorkers{1 * kMiB, 32, 32, 0, Backend::kWorkers};
constexpr Setting kByRing{16 * kMiB, 32};

Cell cell(const Setting& setting, double gb_per_s) { return {.setting = setting, .samples = 5, .gb_per_s = gb_per_s}; }

TEST(Decide, WhereTheDiskAskedForTheWorkersTheBestWithoutThemIsTheLastCandidate) {
  Report report;
  report.disk.cells = {cell(kUsual, 1), cell(kByWorkers, 2), cell(kByRing, 1.5), cell({kMiB, 2}, 1.4)};
  report.page_cache.cells = {cell(kByWorkers, 5)};
  report.pick = kByWorkers;
  EXPECT_EQ(candidates_of(report, kByWorkers), (std::vector<Setting>{kByWorkers, kByRing}));
}

TEST(Decide, TheDefaultIsNoCandidateAndNothingIsOneTwice) {
  Report report;
  report.disk.cells = {cell(kUsual, 1), cell(kByRing, 1.5)};
  report.page_cache.cells = {cell(kByRing, 5), cell({16 * kMiB, 32, 2}, 6)};
  report.pick = {16 * kMiB, 32, 2};
  EXPECT_EQ(candidates_of(report, kByRing), (std::vector<Setting>{report.pick, kByRing}));
  report.page_cache.cells = report.disk.cells = {cell(kUsual, 1)};
  report.pick = kUsual;
  EXPECT_TRUE(candidates_of(report, kUsual).empty());
}

}  // namespace
}  // namespace flashpack::bench
