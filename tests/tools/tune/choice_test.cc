#include "tools/tune/choice.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "tests/support/units.h"
#include "tools/tune/rounds.h"

namespace flashpack::bench {
namespace {

using testing::kMiB;

constexpr Setting kUsual{4 * kMiB, 8, 0};

Cell cell(std::uint32_t chunk_mib, std::uint32_t depth, double gb_per_s, double cpu_s_per_gb,
          std::uint32_t workers = 0) {
  return {{chunk_mib * kMiB, depth, workers}, kEnoughSamples, gb_per_s, cpu_s_per_gb};
}

TEST(Choice, AFasterSettingTakesThePlaceOfTheDefault) {
  EXPECT_EQ(choose({cell(4, 8, 1.0, 0.01), cell(4, 32, 2.0, 0.03)}).setting.queue_depth, 32U);
}

TEST(Choice, TheDefaultIsKeptWhenTheFastestIsWithinTheTolerance) {
  EXPECT_EQ(choose({cell(4, 8, 2.0, 0.5), cell(1, 1, 2.05, 0.0)}).setting, kUsual);
  EXPECT_EQ(choose({cell(4, 8, 2.0, 0.5), cell(1, 1, 2.07, 0.0)}).setting.queue_depth, 1U);
}

TEST(Choice, OfEquallyFastSettingsTheCheapestWins) {
  EXPECT_EQ(choose({cell(4, 8, 1.0, 0.01), cell(1, 32, 2.02, 0.08), cell(4, 32, 2.0, 0.01)}).setting.chunk_bytes,
            4 * kMiB);
  EXPECT_EQ(choose({cell(4, 8, 1.0, 0.01), cell(16, 32, 2.02, 0.01), cell(4, 32, 2.0, 0.02)}).setting.chunk_bytes,
            4 * kMiB);
  EXPECT_EQ(choose({cell(4, 8, 1.0, 0.01), cell(4, 64, 2.02, 0.010), cell(4, 16, 2.0, 0.012)}).setting.queue_depth,
            16U);
  EXPECT_EQ(choose({cell(4, 8, 1.0, 0.01), cell(4, 8, 2.02, 0.01, 8), cell(4, 8, 2.0, 0.01, 4)}).setting.workers, 4U);
  std::vector<Cell> cells{cell(4, 8, 1.0, 0.01), cell(4, 8, 2.02, 0.01), cell(1, 32, 2.0, 0.01)};
  cells[1].setting.staging_bytes = 96 * kMiB;
  cells[2].setting.staging_bytes = 48 * kMiB;
  EXPECT_EQ(choose(cells).setting.staging_bytes, 48 * kMiB);
}

TEST(Choice, OfSettingsThatCostTheSameTheEnginesOwnBackendWins) {
  std::vector<Cell> cells{cell(4, 8, 1.0, 0.01), cell(4, 32, 2.02, 0.01), cell(4, 32, 2.0, 0.01)};
  cells[1].setting.backend = Backend::kWorkers;
  EXPECT_EQ(choose(cells).setting.backend, Backend::kAuto);
}

TEST(Choice, NoTableGivesUpMoreThanTheToleranceOrASettingSlowerThanTheDefault) {
  std::mt19937 random(1);
  std::uniform_real_distribution<double> speed(0.9, 1.0);
  std::uniform_real_distribution<double> cpu(0.0, 0.2);
  for (int table = 0; table < 1000; ++table) {
    std::vector<Cell> cells{cell(4, 8, speed(random), cpu(random))};
    for (std::uint32_t i = 1; i <= 30; ++i) cells.push_back(cell(i, i, speed(random), cpu(random)));
    const Cell& best = choose(cells);
    EXPECT_GE(best.gb_per_s, cells.front().gb_per_s);
    for (const Cell& each : cells) EXPECT_GE(best.gb_per_s, each.gb_per_s * (1 - kTolerance) - 1e-12);
  }
}

TEST(Choice, ATenthOfACoreIsGivenUpForLessMemoryAndNoMore) {
  const auto chunk_of = [](double cpu_s_per_gb) {
    return choose({cell(4, 8, 1.0, 0.01), cell(16, 32, 2.0, 0.01), cell(8, 32, 2.0, cpu_s_per_gb)}).setting.chunk_bytes;
  };
  EXPECT_EQ(chunk_of(0.055), 8 * kMiB);
  EXPECT_EQ(chunk_of(0.065), 16 * kMiB);
}

TEST(Choice, ASettingIsBetterIfItGainsSomewhereAndLosesNowhere) {
  EXPECT_TRUE(is_better({{1.1, 1.1}, {0.99, 0.99}}));
  EXPECT_TRUE(is_better({{0.99, 0.99}, {1.1, 1.1}}));
  EXPECT_FALSE(is_better({{1.1, 1.1}, {0.98, 0.98}}));
  EXPECT_TRUE(is_better({{1.5, 1.5}, {0.98, 0.98}})) << "a large gain may cost more";
  EXPECT_FALSE(is_better({{1.5, 1.5}, {0.96, 0.96}}));
  EXPECT_FALSE(is_better({{1.02, 1.02}, {1.02, 1.02}}));
  EXPECT_FALSE(is_better({}));
}

TEST(Choice, AGainThatMoreThanAnEighthOfThePairsDoNotShowIsNoise) {
  for (const std::size_t count : {kEnoughPairs, 2 * kEnoughPairs}) {
    std::vector<double> pairs(count, 1.1);
    std::fill_n(pairs.begin() + 3, count / 8, 0.9);
    EXPECT_TRUE(gains(pairs)) << count;
    pairs.front() = 0.9;
    EXPECT_FALSE(gains(pairs)) << count;
  }
}

TEST(Choice, FewPairsMayLoseAsManyAsSixteen) {
  EXPECT_TRUE(gains({0.9, 0.9, 1.1, 1.1, 1.1, 1.1, 1.1}));
  EXPECT_FALSE(gains({0.9, 0.9, 0.9, 1.1, 1.1, 1.1, 1.1}));
}

TEST(Choice, WherePairsDifferByChanceTheDefaultStaysInNearlyAllOfManyTrials) {
  std::mt19937 random(1);
  std::uniform_real_distribution<double> speed(0.7, 1.3);
  const auto pairs = [&] {
    std::vector<double> ratios(kEnoughPairs);
    for (double& ratio : ratios) ratio = speed(random) / speed(random);
    return ratios;
  };
  int better = 0;
  for (int trial = 0; trial < 10'000; ++trial) better += is_better({pairs(), pairs()}) ? 1 : 0;
  EXPECT_LT(better, 60);
}

TEST(Choice, ALossInTheMedianOfOneWayToReadOutweighsAGainOfTheOther) {
  const std::vector<double> gain(8, 1.2);
  EXPECT_FALSE(is_better({gain, {0.7, 0.8, 0.9, 0.92, 1.01, 1.1, 1.2, 1.3}}));
  EXPECT_TRUE(is_better({gain, {0.7, 0.8, 0.9, 0.98, 1.0, 1.1, 1.2, 1.3}}));
}

}  // namespace
}  // namespace flashpack::bench
