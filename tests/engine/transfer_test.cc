#include "flashpack/transfer.h"

#include <gtest/gtest.h>

#include <memory>

#include "engine/transfer_state.h"

namespace flashpack::internal {
namespace {

TEST(TransferTest, StatisticsAreEmptyUntilTheEnd) {
  const auto state = std::make_shared<TransferState>();
  state->driver.stats.requested_bytes = 5;
  Transfer transfer = TransferState::handle(state);
  EXPECT_EQ(transfer.stats().requested_bytes, 0u) << "the driver may be writing them";
  EXPECT_FALSE(transfer.progress().finished);
  state->finish(std::nullopt);
  EXPECT_EQ(transfer.stats().requested_bytes, 5u);
  EXPECT_TRUE(transfer.progress().finished);
  EXPECT_EQ(transfer.wait().requested_bytes, 5u);
}

TEST(TransferStatsTest, SumsHaveEveryFigureAndEveryReasonOnce) {
  const TransferStats one{.requested_bytes = 1,
                          .direct_bytes = 2,
                          .buffered_bytes = 3,
                          .staged_bytes = 4,
                          .operations = 5,
                          .retries = 6,
                          .verified_bytes = 7,
                          .seconds = 8,
                          .pinned = true,
                          .backend = Backend::kWorkers,
                          .fallback_reason = "a: b"};
  TransferStats sum;
  sum += one;
  sum += one;
  EXPECT_EQ(sum.requested_bytes, 2u);
  EXPECT_EQ(sum.direct_bytes, 4u);
  EXPECT_EQ(sum.buffered_bytes, 6u);
  EXPECT_EQ(sum.staged_bytes, 8u);
  EXPECT_EQ(sum.operations, 10u);
  EXPECT_EQ(sum.retries, 12u);
  EXPECT_EQ(sum.verified_bytes, 14u);
  EXPECT_EQ(sum.seconds, 0);
  EXPECT_TRUE(sum.pinned);
  EXPECT_EQ(sum.backend, Backend::kWorkers);
  sum += {.fallback_reason = "c: d"};
  EXPECT_EQ(sum.fallback_reason, "a: b; c: d");
}

}  // namespace
}  // namespace flashpack::internal
