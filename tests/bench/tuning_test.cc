#include "bench/support/tuning.h"

#include <gtest/gtest.h>

#include <random>

namespace flashpack::bench {
namespace {

constexpr std::uint32_t kMiB = 1 << 20;

TEST(Tuning, TheFastestPairWinsWhenNoOtherIsAsFast) {
  EXPECT_EQ(choose({{1 * kMiB, 1, 1.0, 0.01}, {4 * kMiB, 8, 2.0, 0.03}}).queue_depth, 8U);
}

TEST(Tuning, AmongEquallyFastPairsTheOneWithLessCpuWins) {
  EXPECT_EQ(choose({{1 * kMiB, 8, 2.02, 0.05}, {4 * kMiB, 8, 2.0, 0.01}}).chunk_bytes, 4 * kMiB);
}

TEST(Tuning, AmongEquallyFastAndCheapPairsTheOneWithFewerBytesInFlightWins) {
  EXPECT_EQ(choose({{4 * kMiB, 32, 2.02, 0.010}, {4 * kMiB, 8, 2.0, 0.012}}).queue_depth, 8U);
}

TEST(Tuning, APairThatIsFourPercentSlowerDoesNotWinHoweverLittleItCosts) {
  EXPECT_EQ(choose({{4 * kMiB, 8, 2.0, 0.2}, {1 * kMiB, 1, 1.92, 0.0}}).queue_depth, 8U);
  EXPECT_EQ(choose({{4 * kMiB, 8, 2.0, 0.2}, {1 * kMiB, 1, 1.95, 0.0}}).queue_depth, 1U);
}

TEST(Tuning, NoPairOfAnyTableIsCheaperAndAsFastAsTheChosenOneNorMoreThanTheToleranceFaster) {
  std::mt19937 random(1);
  std::uniform_real_distribution<double> speed(0.9, 1.0);
  std::uniform_real_distribution<double> cost(0.0, 0.2);
  for (int table = 0; table < 1000; ++table) {
    std::vector<Cell> cells;
    for (std::uint32_t i = 1; i <= 30; ++i) cells.push_back({i * kMiB, i, speed(random), cost(random)});
    const Cell& best = choose(cells);
    const double floor = fastest(cells).gb_per_s * (1 - kTolerance);
    EXPECT_GE(best.gb_per_s, floor);
    for (const Cell& cell : cells) {
      if (cell.gb_per_s < floor) continue;
      EXPECT_LE(best.cpu_s_per_gb, cell.cpu_s_per_gb + kCpuStepSPerGb);
    }
  }
}

}  // namespace
}  // namespace flashpack::bench
