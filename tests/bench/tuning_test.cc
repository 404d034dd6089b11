#include "bench/support/tuning.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <string>

namespace flashpack::bench {
namespace {

constexpr std::uint32_t kMiB = 1 << 20;
constexpr Setting kUsual{4 * kMiB, 8, 0};

Cell cell(std::uint32_t chunk_mib, std::uint32_t depth, double gb_per_s, double cpu_s_per_gb,
          std::uint32_t workers = 0) {
  return {{chunk_mib * kMiB, depth, workers}, kEnoughSamples, gb_per_s, cpu_s_per_gb};
}

TEST(Tuning, LatenciesAreThoseOfTheRequestsWhateverTheirOrderAndNumber) {
  std::vector<double> seconds(200);
  std::iota(seconds.rbegin(), seconds.rend(), 1.0);
  const Latency many = latency_of(seconds);
  EXPECT_EQ(many.p50_s, 100.0);
  EXPECT_EQ(many.p95_s, 190.0);
  EXPECT_EQ(many.p99_s, 198.0);
  const Latency one = latency_of({3.0});
  EXPECT_EQ(one.p50_s, 3.0);
  EXPECT_EQ(one.p99_s, 3.0);
}

TEST(Tuning, AFasterSettingTakesThePlaceOfTheDefault) {
  EXPECT_EQ(choose({cell(4, 8, 1.0, 0.01), cell(4, 32, 2.0, 0.03)}).setting.queue_depth, 32U);
}

TEST(Tuning, TheDefaultIsKeptWhenTheFastestIsWithinTheTolerance) {
  EXPECT_EQ(choose({cell(4, 8, 2.0, 0.5), cell(1, 1, 2.05, 0.0)}).setting, kUsual);
  EXPECT_EQ(choose({cell(4, 8, 2.0, 0.5), cell(1, 1, 2.07, 0.0)}).setting.queue_depth, 1U);
}

TEST(Tuning, OfEquallyFastSettingsTheCheapestWins) {
  EXPECT_EQ(choose({cell(4, 8, 1.0, 0.01), cell(1, 32, 2.02, 0.05), cell(4, 32, 2.0, 0.01)}).setting.chunk_bytes,
            4 * kMiB);
  EXPECT_EQ(choose({cell(4, 8, 1.0, 0.01), cell(4, 64, 2.02, 0.010), cell(4, 16, 2.0, 0.012)}).setting.queue_depth,
            16U);
  EXPECT_EQ(choose({cell(4, 8, 1.0, 0.01), cell(4, 8, 2.02, 0.01, 8), cell(4, 8, 2.0, 0.01, 4)}).setting.workers, 4U);
  std::vector<Cell> cells{cell(4, 8, 1.0, 0.01), cell(4, 8, 2.02, 0.01), cell(1, 32, 2.0, 0.01)};
  cells[1].setting.staging_bytes = 96 * kMiB;
  cells[2].setting.staging_bytes = 48 * kMiB;
  EXPECT_EQ(choose(cells).setting.staging_bytes, 48 * kMiB);
}

TEST(Tuning, NoTableGivesUpMoreThanTheToleranceOrASettingSlowerThanTheDefault) {
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

TEST(Tuning, TheLimitIsTheCeilingThatTheBestIsNearTo) {
  const auto begin_of = [](double gb_per_s, double cpu_s_per_gb, const Ceilings& ceilings) {
    const std::string text = limit_of(cell(4, 8, gb_per_s, cpu_s_per_gb), "disk", ceilings);
    return text.substr(0, text.find(':'));
  };
  EXPECT_EQ(begin_of(50, 0.1, {.link = 55, .copies = 50, .cores = 16}), "link");
  EXPECT_EQ(begin_of(44, 0.1, {.link = 55, .copies = 50, .cores = 16}), "memory");
  EXPECT_EQ(begin_of(44, 0.3, {.link = 55, .copies = 0, .cores = 16}), "CPU");
  EXPECT_EQ(begin_of(44, 0.2, {.link = 55, .copies = 0, .cores = 16}), "disk");
  EXPECT_EQ(begin_of(3, 0.02, {.cores = 2}), "disk");
}

TEST(Tuning, ASettingIsBetterIfItGainsSomewhereAndLosesNowhere) {
  EXPECT_TRUE(is_better({{1.1, 1.1}, {0.98, 0.98}}));
  EXPECT_TRUE(is_better({{0.98, 0.98}, {1.1, 1.1}}));
  EXPECT_FALSE(is_better({{1.1, 1.1}, {0.95, 0.95}}));
  EXPECT_FALSE(is_better({{1.02, 1.02}, {1.02, 1.02}}));
  EXPECT_FALSE(is_better({{1.1}, {}}));
  EXPECT_FALSE(is_better({}));
}

TEST(Tuning, AGainThatAQuarterOfThePairsDoesNotShowIsNoise) {
  EXPECT_FALSE(is_better({{1.3, 0.9, 1.2, 1.0, 1.1, 1.1, 1.1}}));
  EXPECT_TRUE(is_better({{1.3, 0.9, 1.2, 1.1, 1.1, 1.1, 1.1}}));
}

TEST(Tuning, ALossThatAQuarterOfThePairsDoesNotShowIsNoise) {
  const std::vector<double> gain(7, 1.2);
  EXPECT_TRUE(is_better({gain, {0.7, 0.8, 0.9, 0.9, 0.95, 1.01, 1.3}}));
  EXPECT_FALSE(is_better({gain, {0.7, 0.8, 0.9, 0.9, 0.95, 0.99, 1.3}}));
  EXPECT_TRUE(is_better({gain, {0.95, 0.95, 0.96, 0.98, 0.98, 0.99, 0.99}}));
}

TEST(Tuning, TheFirstRoundBeginsWithTheDefaultAndHasEachSettingOnce) {
  for (const auto& settings : {coarse_settings(kUsual), worker_settings(kUsual, 4)}) {
    EXPECT_EQ(settings.front(), kUsual);
    for (const Setting& each : settings) EXPECT_EQ(std::count(settings.begin(), settings.end(), each), 1);
  }
  EXPECT_EQ(worker_settings(kUsual, 4).back().workers, 8U);
  EXPECT_EQ(worker_settings(kUsual, 1000).back().workers, 64U);
}

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

TEST(Tuning, TheSearchFindsAPeakThatIsNotInTheFirstRoundWithFewerSamplesThanTheGrid) {
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

TEST(Tuning, TheSearchOfAFlatDiskEndsAndKeepsTheDefault) {
  int samples = 0;
  EXPECT_EQ(search([](const Setting&) { return 2.0; }, samples), kUsual);
  EXPECT_LT(samples, 50);
}

TEST(Tuning, TheSearchStaysInRange) {
  int samples = 0;
  const Setting largest = search([](const Setting& at) { return double(at.chunk_bytes) * at.queue_depth; }, samples);
  EXPECT_EQ(std::uint64_t{largest.chunk_bytes} * largest.queue_depth, 512 * kMiB);
  const Setting least =
      search([](const Setting& at) { return 1 / (double(at.chunk_bytes) * at.queue_depth); }, samples);
  EXPECT_EQ(least, (Setting{kMiB, 1, 0}));
}

// An engine for a GPU with 12 cores.
SlotGrid grid_of(const Setting& usual) { return {usual, 96 * kMiB, 12, 12}; }

TEST(Tuning, TheGridOfSlotsBeginsWithTheUsualSettingAndReachesAllStagingMemoryAndChunksOnce) {
  const SlotGrid grid = grid_of(kUsual);
  std::vector<Setting> all = grid.coarse();
  EXPECT_EQ(all.front(), kUsual);
  for (std::size_t i = 0; i < all.size(); ++i) {
    for (const Setting& beside : grid.beside(all[i])) {
      if (std::find(all.begin(), all.end(), beside) == all.end()) all.push_back(beside);
    }
  }
  std::set<std::array<std::uint64_t, 3>> made;
  std::set<std::uint64_t> chunks, stagings, workers;
  for (const Setting& each : all) {
    const std::uint64_t staging_bytes = each.staging_bytes == 0 ? 96 * kMiB : each.staging_bytes;
    EXPECT_TRUE(made.insert({each.chunk_bytes, staging_bytes, each.workers == 12 ? 0 : each.workers}).second);
    EXPECT_LE(std::uint64_t{each.chunk_bytes} * each.queue_depth, staging_bytes);
    chunks.insert(each.chunk_bytes / kMiB);
    stagings.insert(staging_bytes / kMiB);
    workers.insert(each.workers);
  }
  EXPECT_EQ(chunks, (std::set<std::uint64_t>{1, 2, 4}));
  EXPECT_EQ(stagings, (std::set<std::uint64_t>{16, 24, 32, 48, 64, 96}));
  EXPECT_EQ(workers, (std::set<std::uint64_t>{0, 1, 2, 4, 8, 16}));
}

TEST(Tuning, TheNumberOfWorkersThatTheEngineChoosesIsNotMeasuredAgain) {
  const SlotGrid grid(kUsual, 96 * kMiB, 8, 8);
  for (const std::uint32_t workers : {4u, 16u}) {
    const auto beside = grid.beside({4 * kMiB, 8, workers});
    EXPECT_EQ(std::count(beside.begin(), beside.end(), kUsual), 1) << workers;
    EXPECT_EQ(std::count(beside.begin(), beside.end(), Setting{4 * kMiB, 8, 8}), 0) << workers;
  }
}

TEST(Tuning, SlotsKeepTheBytesInFlightOfTheDisk) {
  for (const Setting& each : grid_of({4 * kMiB, 8, 0}).coarse()) {
    const std::uint64_t in_flight_bytes = std::uint64_t{each.chunk_bytes} * each.queue_depth;
    EXPECT_EQ(in_flight_bytes, each.staging_bytes == 16 * kMiB ? 16 * kMiB : 32 * kMiB);
  }
}

TEST(Tuning, BesideChunksOfADiskThatAreNotInTheGridOfSlotsLiesTheLargestOfIt) {
  const Setting usual{16 * kMiB, 8, 0};
  const SlotGrid grid(usual, 128 * kMiB, 12, 12);
  const auto beside = grid.beside(usual);
  EXPECT_EQ(std::count(beside.begin(), beside.end(), Setting{16 * kMiB, 6, 0, 96 * kMiB}), 1);
  EXPECT_EQ(std::count(beside.begin(), beside.end(), Setting{4 * kMiB, 32, 0, 128 * kMiB}), 1);
}

TEST(Tuning, TheSearchOfSlotsFindsAPeakBetweenTheFirstOnes) {
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

TEST(Tuning, WithoutRefinementOnlyWhatWasMeasuredIsMeasuredAgain) {
  std::vector<Cell> cells;
  for (const Setting& setting : worker_settings(kUsual, 16)) cells.push_back({setting, 1, 2.0 + setting.workers, 0.1});
  const auto round = next_round(cells, nullptr);
  EXPECT_EQ(round.size(), 4U);
  EXPECT_EQ(round.front(), kUsual);
  for (Cell& each : cells) each.samples = kEnoughSamples;
  EXPECT_TRUE(next_round(cells, nullptr).empty());
}

}  // namespace
}  // namespace flashpack::bench
