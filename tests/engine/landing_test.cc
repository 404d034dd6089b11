#include "engine/landing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "tests/support/units.h"

namespace flashpack::internal {
namespace {

using testing::kMiB;

constexpr std::uint32_t kChunk = 4u << 20;

// Memory is never touched by a plan: any number does for an address.
std::byte* at(std::uint64_t address) { return reinterpret_cast<std::byte*>((std::uint64_t{1} << 40) + address); }

Plan plan_of(std::vector<Fragment> extents) { return Plan::of_load(std::move(extents), kChunk, kPageBytes); }

// The extents that land when these chunks are delivered one after the other.
std::vector<std::uint32_t> deliver(Landing& landing, const Plan& plan, const std::vector<std::uint32_t>& chunks) {
  std::vector<std::uint32_t> landed;
  for (const std::uint32_t chunk : chunks) {
    for (const std::uint32_t each : landing.deliver(chunk)) {
      for (const Fragment& fragment : plan.fragments_of(plan.chunks[each])) {
        if (landing.land(fragment)) landed.push_back(fragment.extent);
      }
    }
  }
  return landed;
}

TEST(Landing, AnExtentHasLandedWhenItsLastChunkHas) {
  const Plan plan = plan_of({{100, 2 * kMiB, at(100), 0}});
  ASSERT_EQ(plan.chunks.size(), 3u) << "head, whole pages, tail";
  Landing landing(plan, 1, 0);
  EXPECT_TRUE(deliver(landing, plan, {2, 0}).empty());
  EXPECT_FALSE(landing.has_landed(0));
  EXPECT_EQ(deliver(landing, plan, {1}), std::vector<std::uint32_t>{0});
  EXPECT_TRUE(landing.has_landed(0));
}

TEST(Landing, ExtentsThatShareAChunkLandWithIt) {
  const Plan plan = plan_of({{0, 10, at(0), 0}, {5, 10, at(100), 1}, {0, 10, at(200), 3}});
  ASSERT_EQ(plan.chunks.size(), 1u);
  Landing landing(plan, 4, 0);
  EXPECT_TRUE(landing.has_landed(2)) << "it has no bytes";
  EXPECT_EQ(deliver(landing, plan, {0}), (std::vector<std::uint32_t>{0, 3, 1}));
}

TEST(Landing, ChunksOfOneCellLandTogetherIfAsked) {
  const std::vector<Fragment> extents = {{0, kMiB, at(0), 0}, {kMiB, kMiB, at(kMiB), 1}, {kChunk, kMiB, at(kChunk), 2}};
  const Plan plan = plan_of(extents);
  ASSERT_EQ(plan.chunks.size(), 3u);
  Landing alone(plan, 3, 0);
  EXPECT_EQ(deliver(alone, plan, {1, 2, 0}), (std::vector<std::uint32_t>{1, 2, 0}));
  Landing by_cell(plan, 3, kChunk);
  EXPECT_EQ(deliver(by_cell, plan, {1}), std::vector<std::uint32_t>{});
  EXPECT_EQ(deliver(by_cell, plan, {2}), std::vector<std::uint32_t>{2});
  EXPECT_EQ(deliver(by_cell, plan, {0}), (std::vector<std::uint32_t>{0, 1}));
}

// Those who compare a cell's stripes read from its first chunk to its last.
TEST(Landing, ChunksOfOneCellLandInTheOrderOfTheFileWhateverTheirPriorities) {
  const std::vector<Fragment> extents = {
      {0, kMiB, at(0), 0, false, 1}, {kMiB, kMiB, at(kMiB), 1, true, 0}, {2 * kMiB, kMiB, at(2 * kMiB), 2, false, 0}};
  const Plan plan = plan_of(extents);
  ASSERT_EQ(plan.chunks.size(), 3u);
  ASSERT_FALSE(std::ranges::is_sorted(plan.chunks, {}, &Chunk::offset_bytes))
      << "the plan begins with what is wanted first";
  Landing by_cell(plan, 3, kChunk);
  EXPECT_TRUE(by_cell.deliver(0).empty());
  EXPECT_TRUE(by_cell.deliver(1).empty());
  const auto landed = by_cell.deliver(2);
  ASSERT_EQ(landed.size(), 3u);
  EXPECT_TRUE(std::ranges::is_sorted(landed, {}, [&](std::uint32_t chunk) { return plan.chunks[chunk].offset_bytes; }));
}

TEST(Landing, ExtentsLandOnceAndNotBeforeAllThatTheyWaitFor) {
  std::mt19937_64 random(11);
  for (int round = 0; round < 1000; ++round) {
    const bool by_cell = random() % 2;
    std::vector<Fragment> extents;
    std::uint64_t offset = 0;
    for (std::uint32_t i = 0; i < 8; ++i) {
      offset += by_cell ? random() % 100'000 : 0;
      if (!by_cell) offset = random() % (3 * kChunk);  // Extents may overlap then.
      const std::uint64_t size = random() % (random() % 2 ? 3 * kChunk / 2 : 5000);
      const bool in_phase = random() % 2;
      const std::uint64_t address = std::uint64_t{i} * 16 * kChunk + (in_phase ? offset % kPageBytes : 8);
      const auto priority = static_cast<std::uint16_t>(random() % 3);
      if (size > 0) extents.push_back({offset, size, at(address), i, random() % 4 == 0, priority});
      offset += size;
    }
    const Plan plan = plan_of(extents);
    std::vector<std::uint32_t> order(plan.chunks.size());
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    Landing landing(plan, 8, by_cell ? kChunk : 0);
    const auto cell_of = [&](std::uint32_t chunk) { return plan.chunks[chunk].offset_bytes / kChunk; };
    const auto waits = [&](std::uint32_t extent, std::uint32_t chunk) {
      const auto is_of = [&](std::uint32_t other) {
        return std::ranges::any_of(plan.fragments_of(plan.chunks[other]),
                                   [&](const Fragment& fragment) { return fragment.extent == extent; });
      };
      if (!by_cell) return is_of(chunk);
      return std::ranges::any_of(order, [&](auto other) { return cell_of(other) == cell_of(chunk) && is_of(other); });
    };
    std::set<std::uint32_t> landed;
    for (std::size_t done = 1; done <= order.size(); ++done) {
      for (const std::uint32_t extent : deliver(landing, plan, {order[done - 1]})) {
        EXPECT_TRUE(landed.insert(extent).second) << "twice";
      }
      for (const Fragment& extent : extents) {
        const bool is_waiting = std::any_of(order.begin() + static_cast<std::ptrdiff_t>(done), order.end(),
                                            [&](std::uint32_t chunk) { return waits(extent.extent, chunk); });
        EXPECT_EQ(landed.contains(extent.extent), !is_waiting) << "round " << round;
      }
    }
  }
}

}  // namespace
}  // namespace flashpack::internal
