#include "tools/tune/grid.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <set>
#include <vector>

#include "tests/support/units.h"

namespace flashpack::bench {
namespace {

using testing::kMiB;

constexpr Setting kUsual{4 * kMiB, 8, 0};

TEST(Grid, TheFirstRoundBeginsWithTheDefaultAndHasEachSettingOnce) {
  for (const auto& settings : {coarse_settings(kUsual), worker_settings(kUsual, 4, 3)}) {
    EXPECT_EQ(settings.front(), kUsual);
    for (const Setting& each : settings) EXPECT_EQ(std::count(settings.begin(), settings.end(), each), 1);
  }
  EXPECT_EQ(worker_settings(kUsual, 4, 4).back().workers, 8U);
  EXPECT_EQ(worker_settings(kUsual, 1000, 8).back().workers, 64U);
}

TEST(Grid, ASearchOfBackendsBeginsWithTheOtherSettingsAndAFewThatTheWorkersRead) {
  const auto without = coarse_settings(kUsual);
  const auto all = coarse_settings_of_backends(kUsual);
  EXPECT_TRUE(std::equal(without.begin(), without.end(), all.begin()));
  ASSERT_GT(all.size(), without.size());
  for (std::size_t i = without.size(); i < all.size(); ++i) EXPECT_EQ(all[i].backend, Backend::kWorkers);
}

TEST(Grid, BesideASettingLiesTheOtherBackendAndWhereTheWorkersReadAlsoOtherNumbersOfThem) {
  const Setting by_workers{2 * kMiB, 16, 0, 0, Backend::kWorkers};
  const auto beside_usual = beside_with_backends(kUsual, kUsual, 8);
  EXPECT_EQ(std::count(beside_usual.begin(), beside_usual.end(), Setting{4 * kMiB, 8, 0, 0, Backend::kWorkers}), 1);
  for (const Setting& each : beside_usual) EXPECT_EQ(each.workers, 0U);
  const auto beside = beside_with_backends(by_workers, kUsual, 8);
  for (const std::uint32_t workers : {4u, 16u})
    EXPECT_EQ(std::count(beside.begin(), beside.end(), Setting{2 * kMiB, 16, workers, 0, Backend::kWorkers}), 1);
  EXPECT_EQ(std::count(beside.begin(), beside.end(), Setting{2 * kMiB, 16}), 1);
  EXPECT_EQ(std::count(beside.begin(), beside.end(), Setting{1 * kMiB, 16, 0, 0, Backend::kWorkers}), 1);
  for (const Setting& each : beside_with_backends({2 * kMiB, 16, 64, 0, Backend::kWorkers}, kUsual, 8))
    EXPECT_LE(each.workers, 64U);
}

// In flight are as many reads as there are workers, and no more than the queue depth. An engine with no number of
// workers has 8.
std::uint32_t reads_in_flight(const Setting& setting) {
  return std::min(setting.queue_depth, setting.workers == 0 ? 8 : setting.workers);
}

TEST(Grid, MoreWorkersThanTheDepthLetsReadRaiseTheDepthAsFarAsMemoryAllows) {
  const auto most_in_flight = [](const Setting& of) {
    std::uint32_t most = 0;
    for (const Setting& each : beside_with_backends(of, kUsual, 8)) {
      if (each.backend != Backend::kWorkers) continue;
      EXPECT_LE(std::uint64_t{each.chunk_bytes} * each.queue_depth, 256 * kMiB);
      most = std::max(most, reads_in_flight(each));
    }
    return most;
  };
  EXPECT_EQ(most_in_flight({4 * kMiB, 32, 32, 0, Backend::kWorkers}), 64U);
  EXPECT_EQ(most_in_flight({4 * kMiB, 8, 0, 0, Backend::kWorkers}), 16U);
  EXPECT_EQ(most_in_flight({8 * kMiB, 32, 32, 0, Backend::kWorkers}), 32U);
  EXPECT_EQ(most_in_flight({4 * kMiB, 64, 64, 0, Backend::kWorkers}), 64U);
}

TEST(Grid, WhereTheWorkersReadTheirNumberIsSearchedAndTheDepthAllowsAllOfThemToRead) {
  const auto coarse = coarse_settings_of_workers(kUsual, 2);
  EXPECT_EQ(coarse.front(), kUsual);
  for (const Setting& each : coarse) EXPECT_EQ(std::count(coarse.begin(), coarse.end(), each), 1);
  EXPECT_EQ(std::count(coarse.begin(), coarse.end(), Setting{4 * kMiB, 32, 32}), 1);
  EXPECT_EQ(std::count(coarse.begin(), coarse.end(), Setting{1 * kMiB, 8, 8}), 1);
  EXPECT_EQ(beside_by_workers(kUsual, kUsual, 2),
            (std::vector<Setting>{{4 * kMiB, 8, 1}, {4 * kMiB, 8, 4}, {2 * kMiB, 8}, {8 * kMiB, 8}}));
  EXPECT_EQ(beside_by_workers({1 * kMiB, 64, 64}, kUsual, 2),
            (std::vector<Setting>{{1 * kMiB, 32, 32}, {2 * kMiB, 64, 64}}));
  EXPECT_EQ(beside_by_workers({8 * kMiB, 64, 64}, kUsual, 2),
            (std::vector<Setting>{{8 * kMiB, 32, 32}, {4 * kMiB, 64, 64}}));
}

TEST(Grid, SettingsForThePageCacheKeepTheBackendOfTheDisk) {
  const Setting by_workers{2 * kMiB, 16, 0, 0, Backend::kWorkers};
  for (const Setting& each : worker_settings(by_workers, 4, 4)) EXPECT_EQ(each.backend, Backend::kWorkers);
  const SlotGrid slots(by_workers, 96 * kMiB, 12, 12);
  for (const Setting& each : slots.coarse()) {
    EXPECT_EQ(each.backend, Backend::kWorkers);
    for (const Setting& beside : slots.beside(each)) EXPECT_EQ(beside.backend, Backend::kWorkers);
  }
}

// An engine for a GPU with 12 cores.
SlotGrid grid_of(const Setting& usual) { return {usual, 96 * kMiB, 12, 12}; }

TEST(Grid, TheGridOfSlotsBeginsWithTheUsualSettingAndReachesAllStagingMemoryAndChunksOnce) {
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

TEST(Grid, TheNumberOfWorkersThatTheEngineChoosesIsNotMeasuredAgain) {
  EXPECT_EQ(worker_settings(kUsual, 4, 4),
            (std::vector<Setting>{kUsual, {4 * kMiB, 8, 1}, {4 * kMiB, 8, 2}, {4 * kMiB, 8, 8}}));
  EXPECT_EQ(worker_settings({4 * kMiB, 32, 32}, 2, 2),
            (std::vector<Setting>{{4 * kMiB, 32, 32}, {4 * kMiB, 32, 1}, {4 * kMiB, 32, 0}, {4 * kMiB, 32, 4}}));
  for (const std::uint32_t workers : {4u, 16u}) {
    const auto beside = beside_with_backends({4 * kMiB, 16, workers, 0, Backend::kWorkers}, kUsual, 8);
    EXPECT_EQ(std::count(beside.begin(), beside.end(), Setting{4 * kMiB, 16, 0, 0, Backend::kWorkers}), 1) << workers;
    for (const Setting& each : beside) EXPECT_NE(each.workers, 8U) << workers;
  }
  const SlotGrid grid(kUsual, 96 * kMiB, 8, 8);
  for (const std::uint32_t workers : {4u, 16u}) {
    const auto beside = grid.beside({4 * kMiB, 8, workers});
    EXPECT_EQ(std::count(beside.begin(), beside.end(), kUsual), 1) << workers;
    EXPECT_EQ(std::count(beside.begin(), beside.end(), Setting{4 * kMiB, 8, 8}), 0) << workers;
  }
}

TEST(Grid, SlotsOfADiskThatAsksForManyWorkersReachTheNumberThatTheEngineChooses) {
  const SlotGrid grid({4 * kMiB, 32, 16}, 128 * kMiB, 8, 8);
  const auto beside = grid.beside({4 * kMiB, 32, 16, 128 * kMiB});
  EXPECT_EQ(std::count(beside.begin(), beside.end(), Setting{4 * kMiB, 32, 0, 128 * kMiB}), 1);
}

TEST(Grid, SlotsKeepTheBytesInFlightOfTheDisk) {
  for (const Setting& each : grid_of({4 * kMiB, 8, 0}).coarse()) {
    const std::uint64_t in_flight_bytes = std::uint64_t{each.chunk_bytes} * each.queue_depth;
    EXPECT_EQ(in_flight_bytes, each.staging_bytes == 16 * kMiB ? 16 * kMiB : 32 * kMiB);
  }
}

TEST(Grid, BesideChunksOfADiskThatAreNotInTheGridOfSlotsLiesTheLargestOfIt) {
  const Setting usual{16 * kMiB, 8, 0};
  const SlotGrid grid(usual, 128 * kMiB, 12, 12);
  const auto beside = grid.beside(usual);
  EXPECT_EQ(std::count(beside.begin(), beside.end(), Setting{16 * kMiB, 6, 0, 96 * kMiB}), 1);
  EXPECT_EQ(std::count(beside.begin(), beside.end(), Setting{4 * kMiB, 32, 0, 128 * kMiB}), 1);
}

}  // namespace
}  // namespace flashpack::bench
