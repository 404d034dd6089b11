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

}  // namespace
}  // namespace flashpack::internal
