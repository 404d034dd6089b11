#include "engine/way.h"

#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <vector>

namespace flashpack::internal {
namespace {

using enum Direction;
using enum ChunkTraits::Route;
using enum ChunkTraits::Memory;

const char* name_of(Step step) {
  switch (step) {
    case Step::kPopulate:
      return "populate";
    case Step::kPopulateSlot:
      return "populate slot";
    case Step::kRead:
      return "read";
    case Step::kWrite:
      return "write";
    case Step::kReadIfCached:
      return "read if cached";
    case Step::kReadCached:
      return "read through the cache";
    case Step::kWriteCached:
      return "write through the cache";
    case Step::kWait:
      return "wait";
    case Step::kScatter:
      return "scatter";
    case Step::kGather:
      return "gather";
    case Step::kCount:
      return "count";
    case Step::kDeliver:
      return "delivered";
    case Step::kFree:
    case Step::kAbandoned:
      break;
  }
  return "no step of a way";
}

// The step that counts has a star, and one that may be skipped a question mark.
std::string text_of(const Way& way) {
  std::string text;
  for (std::size_t i = 0; i < way.steps.size() && way.steps[i] != Step::kFree; ++i) {
    if (i > 0) text += " -> ";
    text += name_of(way.steps[i]);
    if (way.steps[i] == way.counts_in) text += "*";
    if (way.may_skip(way.steps[i])) text += "?";
  }
  return text;
}

struct Row {
  Direction direction;
  ChunkTraits::Route route;
  ChunkTraits::Memory memory;
  const char* plain;
  const char* counted;
};

const std::vector<Row> kRows = {
    {kLoad, kDirect, kInPlace, "populate? -> read -> delivered", "populate? -> read -> count* -> delivered"},
    {kLoad, kDirect, kSlot, "populate slot? -> read -> scatter -> delivered",
     "populate slot? -> read -> scatter* -> delivered"},
    {kLoad, kDirect, kDevice, "read -> wait -> scatter -> delivered", "read -> count* -> wait -> scatter -> delivered"},
    {kLoad, kSeemsCached, kInPlace, "read if cached -> delivered", "read if cached* -> delivered"},
    {kLoad, kSeemsCached, kDevice, "read if cached -> wait -> scatter -> delivered",
     "read if cached* -> wait -> scatter -> delivered"},
    {kLoad, kBuffered, kInPlace, "read through the cache -> delivered", "read through the cache* -> delivered"},
    {kLoad, kBuffered, kDevice, "read through the cache -> wait -> scatter -> delivered",
     "read through the cache* -> wait -> scatter -> delivered"},
    {kLoad, kRefused, kInPlace, "read through the cache -> delivered", "read through the cache* -> delivered"},
    {kLoad, kRefused, kSlot, "read through the cache -> delivered", "read through the cache* -> delivered"},
    {kLoad, kRefused, kDevice, "read through the cache -> wait -> scatter -> delivered",
     "read through the cache* -> wait -> scatter -> delivered"},
    {kStore, kDirect, kInPlace, "populate? -> write -> delivered", "populate* -> write -> delivered"},
    {kStore, kDirect, kSlot, "gather -> write -> delivered", "gather* -> write -> delivered"},
    {kStore, kDirect, kDevice, "wait -> gather -> write -> delivered",
     "wait -> gather -> count* -> write -> delivered"},
    {kStore, kBuffered, kInPlace, "write through the cache -> delivered", "write through the cache* -> delivered"},
    {kStore, kBuffered, kDevice, "wait -> gather -> write through the cache -> delivered",
     "wait -> gather -> write through the cache* -> delivered"},
    {kStore, kRefused, kInPlace, "write through the cache -> delivered", "write through the cache -> delivered"},
    {kStore, kRefused, kSlot, "write through the cache -> delivered", "write through the cache -> delivered"},
    {kStore, kRefused, kDevice, "write through the cache -> delivered", "write through the cache -> delivered"},
};

TEST(WayTest, EveryKindOfChunkGoesThroughTheStepsOfItsRow) {
  for (const Row& row : kRows) {
    const auto way_when = [&](bool counted) {
      return text_of(way_of({row.direction, row.route, row.memory, counted}));
    };
    EXPECT_EQ(way_when(false), row.plain);
    EXPECT_EQ(way_when(true), row.counted);
  }
}

TEST(WayTest, EachByteIsCountedOnceAlsoWhenTheDiskRefuses) {
  const auto counts_before = [](const Way& way, Step end) {
    int counts = 0;
    for (const Step step : way.steps) {
      if (step == end) break;
      counts += step == way.counts_in && step != Step::kFree;
    }
    return counts;
  };
  for (const Row& row : kRows) {
    if (row.route == kRefused) continue;
    const Way way = way_of({row.direction, row.route, row.memory, true});
    EXPECT_EQ(counts_before(way, Step::kDeliver), 1) << row.counted;
    if (row.route != kDirect) continue;
    const Way refused = way_of({row.direction, kRefused, row.memory, true});
    const int counted = counts_before(way, row.direction == kLoad ? Step::kRead : Step::kWrite);
    EXPECT_EQ(counted + counts_before(refused, Step::kDeliver), 1) << row.counted;
  }
}

TEST(WayTest, DirectIoMovesOneStretchOfMemoryAndADeviceIsReachedThroughASlot) {
  for (const Row& row : kRows) {
    const Way way = way_of({row.direction, row.route, row.memory, false});
    EXPECT_EQ(way.to_device, row.memory == kDevice) << row.plain;
    if (row.route == kDirect) {
      EXPECT_EQ(way.view, row.memory == kInPlace ? View::kInPlace : View::kBlocks) << row.plain;
    } else {  // A store that is refused has gathered its bytes.
      const bool in_slot = row.memory == kDevice || (row.memory == kSlot && row.direction == kStore);
      EXPECT_EQ(way.view, in_slot ? View::kSlot : View::kFragments) << row.plain;
    }
  }
}

TEST(WayTest, OperationsOfAFileSystemMayBeLateAndSoMayThoseThatTouchMemoryOfTheHost) {
  const Way host, device{.to_device = true};
  for (const Step step : {Step::kPopulate, Step::kRead, Step::kWrite, Step::kReadIfCached, Step::kReadCached,
                          Step::kWriteCached, Step::kAbandoned}) {
    EXPECT_TRUE(host.may_be_late(step) && device.may_be_late(step)) << name_of(step);
  }
  for (const Step step : {Step::kScatter, Step::kGather, Step::kCount})
    EXPECT_TRUE(host.may_be_late(step) && !device.may_be_late(step)) << name_of(step);
  for (const Step step : {Step::kFree, Step::kWait, Step::kDeliver})
    EXPECT_FALSE(host.may_be_late(step) || device.may_be_late(step)) << name_of(step);
}

}  // namespace
}  // namespace flashpack::internal
