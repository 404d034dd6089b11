#include "tools/tune/decide.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <functional>
#include <random>
#include <vector>

#include "tests/support/units.h"
#include "tools/tune/choice.h"

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

TEST(Decide, WhereTheDiskAskedForOtherChunksTheBestOfTheUsualSizeIsTheLastCandidate) {
  Report report;
  const Setting deep{kUsual.chunk_bytes, 32};
  report.disk.cells = {cell(kUsual, 1), cell(kByRing, 2), cell(deep, 1.9), cell({kUsual.chunk_bytes, 16}, 1.5)};
  report.pick = kByRing;
  EXPECT_EQ(candidates_of(report, kByRing), (std::vector<Setting>{kByRing, deep}));
}

// The number of pairs of each of two ways, with speeds of `first` and `second`, when the time is over at once.
std::vector<std::size_t> pairs_of(
    const std::function<double(int pair)>& first,
    const std::function<double(int pair)>& second = [](int) { return 1.0; }) {
  std::vector<std::size_t> counts;
  for (const auto& pairs : in_turns(
           2, [&](std::size_t way, int pair) { return way == 0 ? first(pair) : second(pair); }, [] { return true; }))
    counts.push_back(pairs.size());
  return counts;
}

TEST(Decide, OnlyACandidateThatGainsGoesOnAfterTheTimeInAllWaysToRead) {
  using Counts = std::vector<std::size_t>;
  EXPECT_EQ(pairs_of([](int) { return 1.0; }), Counts({7, 7}));
  EXPECT_EQ(pairs_of([](int) { return 1.1; }), Counts({16, 16}));
  EXPECT_EQ(pairs_of([](int pair) { return pair < 2 ? 0.9 : 1.1; }), Counts({16, 16})) << "two may lose";
  EXPECT_EQ(pairs_of([](int pair) { return pair < 6 || pair == 9 ? 1.1 : 0.9; }), Counts({9, 9}))
      << "it loses a third time";
}

TEST(Decide, ALossThatMayBeByChanceIsMeasuredTwiceAsOftenAndAClearOneIsNot) {
  using Counts = std::vector<std::size_t>;
  const auto gain = [](int) { return 1.1; };
  EXPECT_EQ(pairs_of(gain, [](int) { return 0.97; }), Counts({32, 32}));
  EXPECT_EQ(pairs_of(gain, [](int) { return 0.9; }), Counts({16, 16}));
  EXPECT_EQ(pairs_of(gain, [](int pair) { return pair < 9 ? 0.97 : 1.0; }), Counts({32, 32}))
      << "it ended as soon as chance said so";
}

TEST(Decide, AGainMayLoseTwiceAsManyOfTwiceAsManyPairs) {
  const auto small_loss = [](int pair) { return pair < 10 ? 0.97 : 1.0; };
  const auto gain = [](int pair) { return pair % 8 == 0 ? 0.9 : 1.1; };
  const auto ratios = in_turns(
      2, [&](std::size_t way, int pair) { return way == 0 ? gain(pair) : small_loss(pair); }, [] { return true; });
  ASSERT_EQ(ratios[0].size(), 2 * kEnoughPairs);
  EXPECT_TRUE(is_better(ratios));
}

TEST(Decide, ASettingThatLosesWhereItDoesNotGainIsSeldomPicked) {
  const auto picked_of_a_thousand = [](double gain, double mean) {
    std::mt19937 random(1);
    std::normal_distribution<double> speed(mean, 0.08);
    const auto pair_of = [&](std::size_t way, int) { return way == 0 ? gain : speed(random); };
    int picked = 0;
    for (int trial = 0; trial < 1000; ++trial) picked += is_better(in_turns(2, pair_of, [] { return true; })) ? 1 : 0;
    return picked;
  };
  EXPECT_LT(picked_of_a_thousand(1.1, 0.95), 100);
  EXPECT_LT(picked_of_a_thousand(1.5, 0.95), 260);
  EXPECT_LT(picked_of_a_thousand(1.1, 0.92), 20);
  EXPECT_GT(picked_of_a_thousand(1.1, 1.0), 700);
}

TEST(Decide, WaysTakeTurnsAndAllPairsAreMeasuredWhileThereIsTime) {
  std::vector<std::size_t> ways;
  in_turns(2, [&](std::size_t way, int) { return ways.push_back(way), 1.0; }, [] { return false; });
  ASSERT_EQ(ways.size(), 2 * kEnoughPairs);
  for (std::size_t i = 0; i < ways.size(); ++i) EXPECT_EQ(ways[i], i % 2);
}

TEST(Decide, WhereNothingStaysInThePageCacheWhatTheDiskAskedForIsTheCandidate) {
  Report report;
  report.disk.cells = {cell(kUsual, 1), cell(kByRing, 1.5)};
  report.pick = kByRing;
  EXPECT_EQ(candidates_of(report, kByRing), std::vector<Setting>{kByRing});
}

}  // namespace
}  // namespace flashpack::bench
