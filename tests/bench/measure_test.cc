#include "bench/support/measure.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <fstream>
#include <optional>
#include <vector>

namespace flashpack::bench {
namespace {

TEST(Measure, TheMedianIsTheMiddleValueOrTheMeanOfTheTwo) {
  EXPECT_DOUBLE_EQ(median({3, 1, 2}), 2);
  EXPECT_DOUBLE_EQ(median({4, 1, 2, 3}), 2.5);
}

TEST(Measure, ASeriesGivesRatesOfItsMedianSample) {
  Series series(2'000'000'000);
  for (const Sample sample : {Sample{1.0, 0.1}, Sample{2.0, 0.2}, Sample{9.0, 0.9}}) series.add(sample);
  EXPECT_DOUBLE_EQ(series.gb_per_s(), 1.0);
  EXPECT_DOUBLE_EQ(series.rates().median, 1.0);
  EXPECT_DOUBLE_EQ(series.cpu_s_per_gb(), 0.1);
  EXPECT_DOUBLE_EQ(series.spread(), 2.0);
}

TEST(Measure, TheLeastAndGreatestRatesAreThoseOfTheSlowestAndTheQuickestSample) {
  Series series(3'000'000'000);
  for (const double seconds : {1.5, 3.0, 1.0}) series.add({.seconds = seconds});
  EXPECT_DOUBLE_EQ(series.rates().min, 1.0);
  EXPECT_DOUBLE_EQ(series.rates().median, 2.0);
  EXPECT_DOUBLE_EQ(series.rates().max, 3.0);
}

TEST(Measure, ThePeakOfMemoryBeginsAnewAndKnowsWhatIsGoneAgain) {
  if (!(std::ofstream("/proc/self/clear_refs") << "5").flush()) GTEST_SKIP() << "this kernel keeps one peak";
  constexpr std::size_t kBytes = std::size_t{64} << 20;
  std::optional<std::vector<std::byte>> bytes(std::in_place, kBytes);
  touch(*bytes);
  bytes.reset();
  const PeakMemory peak;
  EXPECT_LT(peak.grown_bytes(), kBytes / 2);
  bytes.emplace(kBytes);
  touch(*bytes);
  bytes.reset();
  EXPECT_GE(peak.grown_bytes(), kBytes / 2);
  EXPECT_LT(peak.grown_bytes(), 2 * kBytes);
}

}  // namespace
}  // namespace flashpack::bench
