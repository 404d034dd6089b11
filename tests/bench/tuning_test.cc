#include "bench/support/tuning.h"

#include <gtest/gtest.h>

namespace flashpack::bench {
namespace {

constexpr std::uint32_t kMiB = 1 << 20;

TEST(Tuning, TheFastestPairWinsWhenNoOtherIsWithinTheNoise) {
  const Cell best = choose({{1 * kMiB, 1, 1.0, 0.01, 0.01}, {4 * kMiB, 8, 2.0, 0.01, 0.01}});
  EXPECT_EQ(best.queue_depth, 8U);
}

TEST(Tuning, AmongEquallyFastPairsTheOneWithLessCpuWins) {
  const Cell best = choose({{1 * kMiB, 8, 2.02, 0.05, 0.02}, {4 * kMiB, 8, 2.0, 0.01, 0.02}});
  EXPECT_EQ(best.chunk_bytes, 4 * kMiB);
}

TEST(Tuning, AmongEquallyFastAndCheapPairsTheOneWithFewerBytesInFlightWins) {
  const Cell best = choose({{4 * kMiB, 32, 2.02, 0.010, 0.02}, {4 * kMiB, 8, 2.0, 0.012, 0.02}});
  EXPECT_EQ(best.queue_depth, 8U);
}

TEST(Tuning, NoiseOfMoreThanTenPercentDoesNotExcuseASlowPair) {
  const Cell best = choose({{4 * kMiB, 8, 2.0, 0.03, 0.5}, {1 * kMiB, 1, 1.7, 0.01, 0.5}});
  EXPECT_EQ(best.queue_depth, 8U);
}

}  // namespace
}  // namespace flashpack::bench
