#include "engine/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <vector>

namespace flashpack::internal {
namespace {

constexpr std::uint32_t kChunk = 1u << 20;

// Memory is never touched by a plan: any number does for an address.
std::byte* at(std::uint64_t address) { return reinterpret_cast<std::byte*>(address); }

Plan plan_of(std::vector<Fragment> extents, std::uint32_t chunk_bytes = kChunk,
             std::uint32_t block_bytes = kPageBytes) {
  return Plan::of_load(std::move(extents), chunk_bytes, block_bytes);
}

TEST(Plan, EmptyExtentsGiveNoChunks) { EXPECT_TRUE(plan_of({}).chunks.empty()); }

TEST(Plan, WholePagesInPhaseAreReadInPlaceAndEdgesThroughSlots) {
  const Plan plan = plan_of({{100, 2 * kChunk, at((1ull << 30) + 100)}});
  ASSERT_EQ(plan.chunks.size(), 4u);
  EXPECT_FALSE(plan.chunks[0].in_place);
  EXPECT_EQ(plan.chunks[0].offset_bytes, 100u);
  EXPECT_EQ(plan.chunks[0].size_bytes, kPageBytes - 100);
  EXPECT_TRUE(plan.chunks[1].in_place);
  EXPECT_EQ(plan.chunks[1].offset_bytes, kPageBytes);
  EXPECT_EQ(plan.chunks[1].size_bytes, kChunk - kPageBytes);
  EXPECT_TRUE(plan.chunks[2].in_place);
  EXPECT_EQ(plan.chunks[2].size_bytes, kChunk);
  EXPECT_FALSE(plan.chunks[3].in_place);
  EXPECT_EQ(plan.chunks[3].offset_bytes, 2 * kChunk);
  EXPECT_EQ(plan.chunks[3].size_bytes, 100u);
}

TEST(Plan, MemoryOutOfPhaseGoesThroughSlots) {
  for (const Chunk& chunk : plan_of({{0, 3 * kChunk, at((1ull << 30) + 512)}}).chunks) EXPECT_FALSE(chunk.in_place);
}

TEST(Plan, ASmallExtentOfWholePagesIsReadInPlaceIfNothingNearItIsWanted) {
  const Fragment first = {kPageBytes, kPageBytes, at((1ull << 30) + kPageBytes)};
  const Fragment near = {8 * kPageBytes, kPageBytes, at(1ull << 31)};
  const Fragment far = {100 * kPageBytes, 2 * kPageBytes, at(1ull << 32)};
  const auto in_place = [](const std::vector<Fragment>& extents) {
    std::vector<bool> chunks;
    for (const Chunk& chunk : plan_of(extents).chunks) chunks.push_back(chunk.in_place);
    return chunks;
  };
  EXPECT_EQ(in_place({first, far}), (std::vector<bool>{true, true}));
  EXPECT_EQ(in_place({first, near, far}), (std::vector<bool>{false, true})) << "two neighbours share a read";
  EXPECT_EQ(in_place({{kPageBytes, kPageBytes - 1, at((1ull << 30) + kPageBytes)}, far}),
            (std::vector<bool>{false, true}));
  EXPECT_EQ(in_place({{kPageBytes, kPageBytes, at((1ull << 30) + 512)}, far}), (std::vector<bool>{false, true}));
  EXPECT_EQ(in_place({{kPageBytes, kPageBytes, at((1ull << 30) + kPageBytes), 0, 2}, far}),
            (std::vector<bool>{true, false}))
      << "what goes to a device comes behind, and through a slot";
}

TEST(Plan, NeighboursOf64KiBOfWholePagesWithAGapBetweenThemHaveReadsOfTheirOwn) {
  constexpr std::uint64_t k64KiB = 64 << 10;
  const Fragment first = {0, k64KiB, at(1ull << 30)};
  const Fragment second = {k64KiB + kPageBytes, k64KiB, at(1ull << 31)};
  const Fragment third = {end_of(second) + k64KiB, k64KiB, at(1ull << 32)};
  const auto places = [](const std::vector<Fragment>& extents) {
    std::vector<std::pair<std::uint64_t, bool>> chunks;
    for (const Chunk& chunk : plan_of(extents).chunks) chunks.emplace_back(chunk.size_bytes, chunk.in_place);
    return chunks;
  };
  using Places = std::vector<std::pair<std::uint64_t, bool>>;
  EXPECT_EQ(places({first, second, third}), (Places{{k64KiB, true}, {k64KiB, true}, {k64KiB, true}}));

  const Fragment adjacent = {end_of(third), k64KiB, at(1ull << 33)};
  EXPECT_EQ(places({first, second, third, adjacent}), (Places{{k64KiB, true}, {k64KiB, true}, {2 * k64KiB, false}}))
      << "a long run of such extents is read in large operations";
  const Fragment small = {end_of(third) + kPageBytes, k64KiB - kPageBytes, at(1ull << 33)};
  EXPECT_EQ(places({first, second, third, small}), (Places{{k64KiB, true}, {k64KiB, true}, {2 * k64KiB, false}}))
      << "the small one shares the read of its neighbour";
  Fragment out_of_phase = second;
  out_of_phase.memory += 512;
  EXPECT_EQ(places({first, out_of_phase, third}), (Places{{4 * k64KiB + kPageBytes, false}}));
  Fragment on_device = second;
  on_device.device = 1;
  EXPECT_EQ(places({first, on_device}), (Places{{k64KiB, true}, {k64KiB, false}}));
}

TEST(Plan, ThousandSmallTensorsShareOneRead) {
  std::vector<Fragment> extents;
  for (std::uint64_t i = 0; i < 1000; ++i) extents.push_back({i * 1000, 900, at((1ull << 30) + i * 5000)});
  const Plan plan = plan_of(extents);
  ASSERT_EQ(plan.chunks.size(), 1u);
  EXPECT_EQ(plan.chunks[0].fragment_count, 1000u);
  EXPECT_EQ(plan.chunks[0].size_bytes, 999 * 1000 + 900);
}

TEST(Plan, ChunksAreInTheOrderOfPriorityAndThenOfTheFile) {
  const std::vector<Fragment> extents = {{0, 1000, at(1ull << 30), 0, kHost, 1},
                                         {1000, 1000, at(1ull << 31), 1, kHost, 0},
                                         {2000, 1000, at(1ull << 32), 2, kHost, 1},
                                         {kChunk, 1000, at(1ull << 33), 3, 1, 0},
                                         {3 * kChunk, 1000, at(1ull << 34), 4, kHost, 0}};
  const Plan plan = plan_of(extents);
  std::vector<std::uint32_t> order;
  for (const Fragment& fragment : plan.fragments) order.push_back(fragment.extent);
  EXPECT_EQ(order, (std::vector<std::uint32_t>{1, 4, 3, 0, 2}));
  ASSERT_EQ(plan.chunks.size(), 4u) << "the first and the third share a read, but not with the urgent one between them";
  EXPECT_EQ(plan.chunks[3].size_bytes, 3000u);
}

TEST(Plan, DevicesTakeTurnsBehindTheHostInEachPriority) {
  const auto plan = plan_of({{0, 3 * kChunk, at(1ull << 30), 0, 2, 1},
                             {3 * kChunk, kChunk, at(1ull << 31), 1, 1, 1},
                             {4 * kChunk, 2 * kChunk, at(1ull << 32), 2, 3, 0},
                             {6 * kChunk, 2 * kChunk, at(1ull << 33), 3, kHost, 1},
                             {8 * kChunk, kChunk, at(1ull << 34), 4, 1, 1}});
  std::vector<std::uint64_t> order;
  for (const Chunk& chunk : plan.chunks) {
    EXPECT_EQ(plan.fragments_of(chunk).front().offset_bytes, chunk.offset_bytes);
    order.push_back(chunk.offset_bytes / kChunk);
  }
  EXPECT_EQ(order, (std::vector<std::uint64_t>{4, 5, 6, 7, 3, 0, 8, 1, 2}));
}

TEST(Plan, ExtentsOfTwoPrioritiesShareNoChunk) {
  const Plan plan = plan_of({{0, 10, at(1ull << 30), 0, kHost, 0},
                             {20, 10, at(1ull << 31), 1, kHost, 0},
                             {10, 10, at(1ull << 32), 2, kHost, 1}});
  ASSERT_EQ(plan.chunks.size(), 2u);
  EXPECT_EQ(plan.chunks[0].fragment_count, 2u);
  EXPECT_EQ(plan.fragments_of(plan.chunks[1]).front().extent, 2u);
}

// An extent that lies in the gap between two of another device does not end their read.
TEST(Plan, ExtentsOfTwoDevicesThatAlternateAreOneReadForEach) {
  std::vector<Fragment> extents;
  for (std::uint32_t i = 0; i < 20; ++i)
    extents.push_back({i * 1000, 900, at((1ull << 30) + i * 5000), i, static_cast<DeviceNumber>(2 - i % 2)});
  const Plan plan = plan_of(extents);
  ASSERT_EQ(plan.chunks.size(), 2u);
  EXPECT_EQ(plan.chunks[0].device, 1u);
  EXPECT_EQ(plan.chunks[1].device, 2u);
  EXPECT_EQ(plan.chunks[0].fragment_count, 10u);
  EXPECT_EQ(plan.chunks[0].offset_bytes, 1000u);
  EXPECT_EQ(plan_of({{0, 10, at(1ull << 30), 0, 1}, {20, 10, at(1ull << 31), 1, 2}}).chunks.size(), 2u);
}

TEST(Plan, AGapWorthSkippingSplitsTheRead) {
  EXPECT_EQ(plan_of({{0, 10, at(1ull << 30)}, {200'000, 10, at(1ull << 31)}}).chunks.size(), 2u);
  EXPECT_EQ(plan_of({{0, 10, at(1ull << 30)}, {60'000, 10, at(1ull << 31)}}).chunks.size(), 1u);
}

TEST(Plan, NeighboursEdgesShareTheBlockTheyMeetIn) {
  const std::uint64_t cut = 2 * kChunk + 1000;
  const Plan plan = plan_of({{0, cut, at(1ull << 30)}, {cut, kChunk, at((1ull << 31) + 1000)}});
  const auto shared =
      std::find_if(plan.chunks.begin(), plan.chunks.end(), [](const Chunk& c) { return c.fragment_count == 2; });
  ASSERT_NE(shared, plan.chunks.end());
  EXPECT_EQ(shared->offset_bytes, 2 * kChunk);
  EXPECT_EQ(shared->size_bytes, kPageBytes);
}

// Every plan, whatever the extents: each wanted byte exactly once, nothing else, no chunk over a grid line.
TEST(Plan, DeliversEveryByteOnceWithinTheGrid) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 2000; ++round) {
    const std::uint32_t chunk_bytes = 1u << (20 + random() % 3);
    const std::uint32_t block_bytes = 1u << (12 + random() % 5);
    std::vector<Fragment> extents;
    std::map<std::uint64_t, std::uint64_t> wanted;  // Address of a byte's run -> file offset, by extent.
    std::uint64_t address = 1ull << 40;
    for (auto n = random() % 6; n > 0; --n) {
      const std::uint64_t offset = random() % (8 * chunk_bytes);
      const std::uint64_t size = 1 + random() % (random() % 2 ? 3 * chunk_bytes : 5000);
      if (random() % 2) address += (offset - address) & (block_bytes - 1);  // In phase.
      extents.push_back({offset, size, at(address)});
      wanted[address] = offset;
      address += size + random() % 100'000;
    }
    const Plan plan = plan_of(extents, chunk_bytes, block_bytes);
    std::vector<std::pair<std::uint64_t, std::uint64_t>> delivered;  // Address, size.
    std::uint64_t fragments_seen = 0;
    for (const Chunk& chunk : plan.chunks) {
      EXPECT_EQ(chunk.first_fragment, fragments_seen);
      fragments_seen += chunk.fragment_count;
      EXPECT_EQ(chunk.offset_bytes / chunk_bytes, (chunk.offset_bytes + chunk.size_bytes - 1) / chunk_bytes);
      for (const Fragment& fragment : plan.fragments_of(chunk)) {
        EXPECT_GE(fragment.offset_bytes, chunk.offset_bytes);
        EXPECT_LE(fragment.offset_bytes + fragment.size_bytes, chunk.offset_bytes + chunk.size_bytes);
        const auto memory = reinterpret_cast<std::uint64_t>(fragment.memory);
        const auto run = std::prev(wanted.upper_bound(memory));
        EXPECT_EQ(fragment.offset_bytes, run->second + (memory - run->first)) << "bytes of the wrong place";
        delivered.emplace_back(memory, fragment.size_bytes);
        if (chunk.in_place) {
          EXPECT_EQ(fragment.size_bytes % block_bytes, 0u);
          EXPECT_EQ(fragment.offset_bytes % block_bytes, 0u);
          EXPECT_EQ(memory % block_bytes, 0u);
        }
      }
    }
    EXPECT_EQ(fragments_seen, plan.fragments.size());
    std::sort(delivered.begin(), delivered.end());
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < delivered.size(); ++i) {
      total += delivered[i].second;
      if (i > 0) {
        EXPECT_GE(delivered[i].first, delivered[i - 1].first + delivered[i - 1].second);
      }
    }
    std::uint64_t asked = 0;
    for (const Fragment& extent : extents) asked += extent.size_bytes;
    EXPECT_EQ(total, asked);
    EXPECT_EQ(plan.total_bytes, asked);
  }
}

// A store, byte by byte: who writes it. Chunks of whole blocks write all of their bytes, others those of their
// fragments.
class StoreMap {
 public:
  StoreMap(const Plan& plan, std::uint64_t size_bytes, std::uint32_t block_bytes) : source_of_(size_bytes) {
    for (const Chunk& chunk : plan.chunks) {
      if ((chunk.offset_bytes | chunk.size_bytes) % block_bytes == 0) {
        direct_bytes_ += chunk.size_bytes;
        for (std::uint64_t i = 0; i < chunk.size_bytes; ++i) write(chunk.offset_bytes + i, kZero);
      }
      for (const Fragment& fragment : plan.fragments_of(chunk)) {
        for (std::uint64_t i = 0; i < fragment.size_bytes; ++i) {
          write(fragment.offset_bytes + i, reinterpret_cast<std::uint64_t>(fragment.memory) + i);
        }
      }
    }
  }

  /// Address of the byte that comes to `offset`; kZero, or 0 where nothing is written.
  std::uint64_t source_of(std::uint64_t offset) const { return source_of_[offset]; }
  bool any_twice() const { return twice_; }
  std::uint64_t direct_bytes() const { return direct_bytes_; }
  static constexpr std::uint64_t kZero = ~0ull;

 private:
  void write(std::uint64_t offset, std::uint64_t source) {
    std::uint64_t& is = source_of_.at(offset);
    twice_ |= is != 0 && !(is == kZero && source != kZero);
    is = source;
  }

  std::vector<std::uint64_t> source_of_;
  std::uint64_t direct_bytes_ = 0;
  bool twice_ = false;
};

TEST(Plan, AStoreWritesWholeBlocksDirectlyAndWhatIsLessAtItsEnds) {
  const Plan plan = Plan::of_store({{100, 3 * kPageBytes, at((1ull << 30) + 1)}}, kChunk, {});
  ASSERT_EQ(plan.chunks.size(), 3u);
  EXPECT_EQ(plan.chunks[0].offset_bytes, 100u);
  EXPECT_EQ(plan.chunks[0].size_bytes, kPageBytes - 100);
  EXPECT_EQ(plan.chunks[1].offset_bytes, kPageBytes);
  EXPECT_EQ(plan.chunks[1].size_bytes, 2 * kPageBytes);
  EXPECT_EQ(plan.chunks[2].offset_bytes, 3 * kPageBytes);
  EXPECT_EQ(plan.chunks[2].size_bytes, 100u);
}

TEST(Plan, AStoreNeedsItsMemoryAlignedOnlyForTheDevice) {
  const std::vector<Fragment> extents{{0, kChunk, at((1ull << 30) + 512)}};
  EXPECT_FALSE(Plan::of_store(extents, kChunk, {kPageBytes, kPageBytes}).chunks.at(0).in_place);
  EXPECT_TRUE(Plan::of_store(extents, kChunk, {kPageBytes, 512}).chunks.at(0).in_place);
}

TEST(Plan, SmallGapsOfAStoreAreZerosUnlessAnExtentOfAnotherPlaceMayLieInThem) {
  std::vector<Fragment> extents{{0, kPageBytes - 10, at(1ull << 30)}, {kPageBytes + 10, kPageBytes, at(1ull << 31)}};
  const Plan filled = Plan::of_store(extents, kChunk, {});
  EXPECT_EQ(StoreMap(filled, kChunk, kPageBytes).source_of(kPageBytes), StoreMap::kZero);
  EXPECT_EQ(Plan::zeros_between(extents, {}), kPageBytes - 1);
  extents.push_back({kPageBytes, 5, at(1ull << 32), 2, 1});
  EXPECT_EQ(Plan::zeros_between(extents, {}), 0u);
  const StoreMap both(Plan::of_store(extents, kChunk, {}), kChunk, kPageBytes);
  EXPECT_EQ(both.source_of(kPageBytes), 1ull << 32);
  EXPECT_EQ(both.source_of(kPageBytes + 5), 0u);
  EXPECT_FALSE(both.any_twice());
  for (const DeviceNumber second : {DeviceNumber{1}, DeviceNumber{2}}) {
    const std::vector<Fragment> on_devices{{0, 10, at(1ull << 30), 0, 1}, {20, 10, at(1ull << 31), 1, second}};
    EXPECT_EQ(Plan::zeros_between(on_devices, {}), second == 1 ? kPageBytes - 1 : 0);
  }
}

TEST(Plan, AFragmentKnowsItsExtentAndItsDevice) {
  const std::vector<Fragment> extents{
      {3 * kChunk, 100, at(1ull << 30), 0, 1}, {5, 2 * kChunk, at((1ull << 31) + 5), 1, kHost},
      {0, 5, at(1ull << 32), 2, kHost},        {3 * kChunk + 100, 50, at(1ull << 34), 3, 2},
      {10, 20, at(1ull << 33), 4, 1},          {40, 20, at(1ull << 35), 5, 2}};
  for (const Plan& plan : {Plan::of_load(extents, kChunk, kPageBytes),
                           Plan::of_store({extents.begin(), extents.begin() + 4}, kChunk, {})}) {
    std::map<std::uint32_t, std::uint64_t> bytes_of;
    for (const Chunk& chunk : plan.chunks) {
      for (const Fragment& fragment : plan.fragments_of(chunk)) {
        const Fragment& extent = extents.at(fragment.extent);
        EXPECT_EQ(fragment.offset_bytes - extent.offset_bytes,
                  static_cast<std::uint64_t>(fragment.memory - extent.memory));
        EXPECT_EQ(fragment.device, extent.device);
        EXPECT_EQ(chunk.device, extent.device) << "devices share no chunk";
        bytes_of[fragment.extent] += fragment.size_bytes;
      }
    }
    for (const auto& [extent, bytes] : bytes_of) EXPECT_EQ(bytes, extents[extent].size_bytes);
    EXPECT_GE(bytes_of.size(), 4u);
  }
}

// Every store, whatever the extents: each byte once, from its place; zeros only less than a block from an extent; no
// chunk over a grid line.
TEST(Plan, AStoreWritesEveryByteOnceAndNothingElse) {
  std::mt19937_64 random(5);
  for (int round = 0; round < 40; ++round) {
    const std::uint32_t block_bytes = 1u << (12 + random() % 3);
    const std::uint32_t memory_bytes = 1u << (9 + random() % 4);
    const bool fill_gaps = random() % 2;
    std::vector<Fragment> extents;
    std::uint64_t end = random() % 10'000;
    for (auto n = random() % 8; n > 0; --n) {
      const std::uint64_t size = 1 + random() % (random() % 2 ? 400'000 : 3000);
      const std::uint64_t phase = random() % 2 ? end % memory_bytes : random() % memory_bytes;
      extents.push_back({end, size, at((1ull << 40) + n * (1ull << 30) + phase)});
      end += size + (random() % 3 ? random() % 3 : random() % 20'000);
    }
    end = round_up(end, block_bytes);
    if (!fill_gaps) extents.push_back({end, block_bytes, at(1ull << 50), 0, extents.empty() ? kHost : DeviceNumber{1}});
    const std::uint64_t file_end = end + block_bytes;
    const Plan plan = Plan::of_store(extents, kChunk, {block_bytes, memory_bytes});
    const StoreMap map(plan, file_end, block_bytes);
    EXPECT_FALSE(map.any_twice());
    for (const Chunk& chunk : plan.chunks) {
      EXPECT_EQ(chunk.offset_bytes / kChunk, (chunk.offset_bytes + chunk.size_bytes - 1) / kChunk);
      if (!chunk.in_place) continue;
      EXPECT_EQ(plan.fragments_of(chunk).front().size_bytes, chunk.size_bytes);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(plan.fragments_of(chunk).front().memory) % memory_bytes, 0u);
    }
    std::uint64_t at_byte = 0;
    for (const Fragment& extent : extents) {
      const bool between = fill_gaps && at_byte > 0 && extent.offset_bytes - at_byte < block_bytes;
      for (; at_byte < extent.offset_bytes; ++at_byte) {
        const std::uint64_t source = map.source_of(at_byte);
        ASSERT_TRUE(source == 0 || (between && source == StoreMap::kZero)) << at_byte;
      }
      for (; at_byte < extent.offset_bytes + extent.size_bytes; ++at_byte) {
        const auto source = reinterpret_cast<std::uint64_t>(extent.memory) + (at_byte - extent.offset_bytes);
        ASSERT_EQ(map.source_of(at_byte), source) << at_byte;
      }
    }
    for (; at_byte < file_end; ++at_byte) ASSERT_EQ(map.source_of(at_byte), 0u) << at_byte;
    EXPECT_LE(plan.total_bytes, map.direct_bytes() + (extents.size() + 1) * 2 * block_bytes);
  }
}

}  // namespace
}  // namespace flashpack::internal
