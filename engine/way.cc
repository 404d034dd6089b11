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
  View view;
};

// A worker counts the bytes in a step in which it touches them anyway. Where there is no such step, kCount is added.
//
// A chunk becomes kRefused when the file system refuses its kRead or kWrite. It then goes another way from the
// beginning. Its row takes into account what the chunk has done before:
// - A store has gathered its bytes and has counted them, so that its row only writes them, from where they are now. If
//   they were counted once more, the sum would be wrong.
// - A load has counted nothing, so that its row is that of kBuffered. A worker can read straight into host memory, so
//   that only a load to a device keeps its slot.
//
// Direct I/O moves whole blocks, so that its slots have kBlocks. All other I/O moves exactly the chunk's bytes.
constexpr std::array<Row, 18> kTable{{
    {kLoad, kDirect, kInPlace, {kPopulate, kRead, kCount, kDeliver}, kCount, View::kInPlace},
    {kLoad, kDirect, kSlot, {kPopulateSlot, kRead, kScatter, kDeliver}, kScatter, View::kBlocks},
    {kLoad, kDirect, kDevice, {kRead, kCount, kWait, kScatter, kDeliver}, kCount, View::kBlocks},
    {kLoad, kSeemsCached, kInPlace, {kReadIfCached, kDeliver}, kReadIfCached, View::kFragments},
    {kLoad, kSeemsCached, kDevice, {kReadIfCached, kWait, kScatter, kDeliver}, kReadIfCached, View::kSlot},
    {kLoad, kBuffered, kInPlace, {kReadCached, kDeliver}, kReadCached, View::kFragments},
    {kLoad, kBuffered, kDevice, {kReadCached, kWait, kScatter, kDeliver}, kReadCached, View::kSlot},
    {kLoad, kRefused, kInPlace, {kReadCached, kDeliver}, kReadCached, View::kFragments},
    {kLoad, kRefused, kSlot, {kReadCached, kDeliver}, kReadCached, View::kFragments},
    {kLoad, kRefused, kDevice, {kReadCached, kWait, kScatter, kDeliver}, kReadCached, View::kSlot},
    {kStore, kDirect, kInPlace, {kPopulate, kWrite, kDeliver}, kPopulate, View::kInPlace},
    {kStore, kDirect, kSlot, {kGather, kWrite, kDeliver}, kGather, View::kBlocks},
    {kStore, kDirect, kDevice, {kWait, kGather, kCount, kWrite, kDeliver}, kCount, View::kBlocks},
    {kStore, kBuffered, kInPlace, {kWriteCached, kDeliver}, kWriteCached, View::kFragments},
    {kStore, kBuffered, kDevice, {kWait, kGather, kWriteCached, kDeliver}, kWriteCached, View::kSlot},
    {kStore, kRefused, kInPlace, {kWriteCached, kDeliver}, kFree, View::kFragments},
    {kStore, kRefused, kSlot, {kWriteCached, kDeliver}, kFree, View::kSlot},
    {kStore, kRefused, kDevice, {kWriteCached, kDeliver}, kFree, View::kSlot},
}};

}  // namespace

Way way_of(const ChunkTraits& chunk) {
  const auto* const row = std::find_if(kTable.begin(), kTable.end(), [&](const Row& each) {
    return each.direction == chunk.direction && each.route == chunk.route && each.memory == chunk.memory;
  });
  assert(row != kTable.end());
  Way way{row->steps, chunk.counted ? row->counts_in : kFree, row->view, row->memory == kDevice};
  if (!chunk.counted) std::fill(std::remove(way.steps.begin(), way.steps.end(), kCount), way.steps.end(), kFree);
  return way;
}

}  // namespace flashpack::internal
