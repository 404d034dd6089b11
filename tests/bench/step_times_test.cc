#include "bench/support/step_times.h"

#include <gtest/gtest.h>

#include <chrono>

#include "flashpack/engine.h"
#include "tests/support/temp_dir.h"

namespace flashpack::bench {
namespace {

// Times are far from the clock's epoch, as those of a machine that runs.
TraceEvent step(TraceStage stage, int begin_ms, int end_ms, std::uint32_t depth = 1) {
  const TraceEvent::Time start{std::chrono::hours(1)};
  return {.stage = stage,
          .path = {},
          .begin = start + std::chrono::milliseconds(begin_ms),
          .end = start + std::chrono::milliseconds(end_ms),
          .depth = depth,
          .error = {},
          .note = {}};
}

TEST(StepTimes, TimeInWhichSeveralStepsWereUnderWayCountsOnce) {
  StepTimes times;
  // The driver sees steps end in another order than they began.
  times.event(step(TraceStage::kRead, 10, 20, 2));
  times.event(step(TraceStage::kReadCached, 0, 30, 3));
  times.event(step(TraceStage::kRead, 50, 60));
  times.event(step(TraceStage::kRead, 55, 70));
  times.event(step(TraceStage::kCopy, 30, 40));
  times.event(step(TraceStage::kTransfer, 0, 100));
  const StepTimes::Totals totals = times.totals();
  EXPECT_DOUBLE_EQ(totals.io_share, 0.5);
  EXPECT_DOUBLE_EQ(totals.copy_share, 0.1);
  EXPECT_EQ(totals.depth, 3U);
}

TEST(StepTimes, OtherStepsCountForNothing) {
  StepTimes times;
  for (const TraceStage stage :
       {TraceStage::kPopulate, TraceStage::kChecksum, TraceStage::kWait, TraceStage::kOpen, TraceStage::kClose})
    times.event(step(stage, 0, 100, 9));
  times.event(step(TraceStage::kWrite, 0, 25));
  times.event(step(TraceStage::kTransfer, 0, 100));
  EXPECT_DOUBLE_EQ(times.totals().io_share, 0.25);
  EXPECT_DOUBLE_EQ(times.totals().copy_share, 0);
  EXPECT_EQ(times.totals().depth, 1U);
}

TEST(StepTimes, TimeBetweenTransfersIsNoTransfersTime) {
  StepTimes times;
  times.event(step(TraceStage::kWriteCached, 0, 10));
  times.event(step(TraceStage::kTransfer, 0, 10));
  times.event(step(TraceStage::kTransfer, 90, 100));
  EXPECT_DOUBLE_EQ(times.totals().io_share, 0.5);
}

TEST(StepTimes, WithoutATransferThereAreNoShares) {
  EXPECT_DOUBLE_EQ(StepTimes().totals().io_share, 0);
  EXPECT_EQ(StepTimes().totals().depth, 0U);
}

TEST(StepTimes, ALoadOfAnEngineHasReadsForSomeOfItsTime) {
  const flashpack::testing::TempDir dir;
  std::vector<std::byte> bytes = flashpack::testing::random_bytes(std::size_t{9} << 20);
  flashpack::testing::write_file(dir / "file", bytes);
  StepTimes times;
  Engine engine({.trace = &times});
  engine.load({.files = {{.path = dir / "file", .extents = {{0, bytes.size(), bytes.data()}}}}});
  const StepTimes::Totals totals = times.totals();
  EXPECT_GT(totals.io_share, 0);
  EXPECT_LE(totals.io_share, 1);
  EXPECT_GE(totals.depth, 1U);
}

}  // namespace
}  // namespace flashpack::bench
