#include "engine/way.h"

#include <algorithm>
#include <cassert>

namespace flashpack::internal {

namespace {

using enum Direction;
using enum ChunkTraits::Route;
using enum ChunkTraits::Memory;
using enum Step;

struct Row {
  Direction direction;
  ChunkTraits::Route route;
  ChunkTraits::Memory memory;
  std::array<Step, 5> steps;  // Steps of a chunk whose bytes are counted; other chunks leave kCount out.
  Step counts_in;
};

// Counting is a step of its own where no worker touches the bytes in another step. A store that is refused has been
// counted already. A load that is refused has not, and gives back its slot unless it is for a device.
constexpr std::array<Row, 18> kTable{{
    {kLoad, kDirect, kInPlace, {kPopulate, kRead, kCount, kDeliver}, kCount},
    {kLoad, kDirect, kSlot, {kRead, kScatter, kDeliver}, kScatter},
    {kLoad, kDirect, kDevice, {kRead, kCount, kWait, kScatter, kDeliver}, kCount},
    {kLoad, kSeemsCached, kInPlace, {kReadIfCached, kDeliver}, kReadIfCached},
    {kLoad, kSeemsCached, kDevice, {kReadIfCached, kWait, kScatter, kDeliver}, kReadIfCached},
    {kLoad, kBuffered, kInPlace, {kReadCached, kDeliver}, kReadCached},
    {kLoad, kBuffered, kDevice, {kReadCached, kWait, kScatter, kDeliver}, kReadCached},
    {kLoad, kRefused, kInPlace, {kReadCached, kDeliver}, kReadCached},
    {kLoad, kRefused, kSlot, {kReadCached, kDeliver}, kReadCached},
    {kLoad, kRefused, kDevice, {kReadCached, kWait, kScatter, kDeliver}, kReadCached},
    {kStore, kDirect, kInPlace, {kPopulate, kWrite, kDeliver}, kPopulate},
    {kStore, kDirect, kSlot, {kGather, kWrite, kDeliver}, kGather},
    {kStore, kDirect, kDevice, {kWait, kGather, kCount, kWrite, kDeliver}, kCount},
    {kStore, kBuffered, kInPlace, {kWriteCached, kDeliver}, kWriteCached},
    {kStore, kBuffered, kDevice, {kWait, kGather, kWriteCached, kDeliver}, kWriteCached},
    {kStore, kRefused, kInPlace, {kWriteCached, kDeliver}, kFree},
    {kStore, kRefused, kSlot, {kWriteCached, kDeliver}, kFree},
    {kStore, kRefused, kDevice, {kWriteCached, kDeliver}, kFree},
}};

}  // namespace

Way way_of(const ChunkTraits& chunk) {
  const auto* const row = std::find_if(kTable.begin(), kTable.end(), [&](const Row& each) {
    return each.direction == chunk.direction && each.route == chunk.route && each.memory == chunk.memory;
  });
  assert(row != kTable.end());
  Way way{row->steps, chunk.counted ? row->counts_in : kFree};
  if (!chunk.counted) std::fill(std::remove(way.steps.begin(), way.steps.end(), kCount), way.steps.end(), kFree);
  return way;
}

}  // namespace flashpack::internal
