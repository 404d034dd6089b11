#include "tools/tune/rounds.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/support/units.h"
#include "tools/tune/choice.h"
#include "tools/tune/grid.h"

namespace flashpack::bench {
namespace {

using testing::kMiB;

constexpr Setting kUsual{4 * kMiB, 8, 0};

// An engine for a GPU with 12 cores.
SlotGrid grid_of(const Setting& usual) { return {usual, 96 * kMiB, 12, 12}; }

// Searches a disk whose speed is a smooth function of chunk size and depth, and says how many samples that took.
Setting search(double (*gb_per_s)(const Setting&), int& samples) {
  std::vector<Cell> cells;
  for (auto round = coarse_settings(kUsual); !round.empty(); round = next_round(cells, beside_on_disk)) {
    EXPECT_TRUE(std::find(round.begin(), round.end(), kUsual) != round.end());
    for (const Setting& setting : round) {
      auto found = std::find_if(cells.begin(), cells.end(), [&](const Cell& each) { return each.setting == setting; });
      if (found == cells.end()) found = cells.insert(cells.end(), {setting, 0, gb_per_s(setting), 0.01});
      ++found->samples;
      ++samples;
    }
  }
  return choose(cells).setting;
}

TEST(Rounds, TheSearchFindsAPeakThatIsNotInTheFirstRoundWithFewerSamplesThanTheGrid) {
  int samples = 0;
  const Setting found = search(
      [](const Setting& at) {
        const double chunk = std::log2(at.chunk_bytes / kMiB) - 1;
        const double depth = std::log2(at.queue_depth) - 6;
        return 4 - 0.3 * chunk * chunk - 0.3 * depth * depth;
      },
      samples);
  EXPECT_EQ(found, (Setting{2 * kMiB, 64, 0}));
  EXPECT_LT(samples, 7 * 8 * kEnoughSamples / 2);
}

TEST(Rounds, TheSearchOfAFlatDiskEndsAndKeepsTheDefault) {
  int samples = 0;
  EXPECT_EQ(search([](const Setting&) { return 2.0; }, samples), kUsual);
  EXPECT_LT(samples, 50);
}

TEST(Rounds, TheSearchStaysInRange) {
  int samples = 0;
  const Setting largest = search([](const Setting& at) { return double(at.chunk_bytes) * at.queue_depth; }, samples);
  EXPECT_EQ(std::uint64_t{largest.chunk_bytes} * largest.queue_depth, 256 * kMiB);
  const Setting least =
      search([](const Setting& at) { return 1 / (double(at.chunk_bytes) * at.queue_depth); }, samples);
  EXPECT_EQ(least, (Setting{kMiB, 1, 0}));
}

TEST(Rounds, TheSearchOfSlotsFindsAPeakBetweenTheFirstOnes) {
  const SlotGrid grid = grid_of(kUsual);
  std::vector<Cell> cells;
  const auto gb_per_s = [](const Setting& at) {
    const double staging = std::log2(static_cast<double>(at.staging_bytes == 0 ? 96 * kMiB : at.staging_bytes) / kMiB);
    return 44 - 2 * std::abs(staging - std::log2(24)) - (at.chunk_bytes == 2 * kMiB ? 0 : 1) -
           (at.workers == 8 ? 0 : 1.5);
  };
  for (auto round = grid.coarse(); !round.empty();
       round = next_round(cells, [&](const Setting& of) { return grid.beside(of); })) {
    for (const Setting& setting : round) {
      auto found = std::find_if(cells.begin(), cells.end(), [&](const Cell& each) { return each.setting == setting; });
      if (found == cells.end()) found = cells.insert(cells.end(), {setting, 0, gb_per_s(setting), 0.01});
      ++found->samples;
    }
  }
  const auto best = std::max_element(cells.begin(), cells.end(),
                                     [](const Cell& a, const Cell& b) { return a.gb_per_s < b.gb_per_s; });
  EXPECT_EQ(best->setting, (Setting{2 * kMiB, 12, 8, 24 * kMiB}));
}

TEST(Rounds, WithoutRefinementOnlyWhatWasMeasuredIsMeasuredAgain) {
  std::vector<Cell> cells;
  for (const Setting& setting : worker_settings(kUsual, 16, 8))
    cells.push_back({setting, 1, 2.0 + setting.workers, 0.1});
  const auto round = next_round(cells, nullptr);
  EXPECT_EQ(round.size(), 4U);
  EXPECT_EQ(round.front(), kUsual);
  for (Cell& each : cells) each.samples = kEnoughSamples;
  EXPECT_TRUE(next_round(cells, nullptr).empty());
}

}  // namespace
}  // namespace flashpack::bench
