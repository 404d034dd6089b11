#include "engine/transfer_state.h"

#include <gtest/gtest.h>

#include <chrono>
#include <future>

#include "tests/support/hang.h"

namespace flashpack::internal {
namespace {

using flashpack::testing::kHang;

bool visible_elsewhere(const TransferEnd& end) {
  return std::async(std::launch::async, [&end] { return end.is_visible(); }).get();
}

TEST(TransferEndTest, TheThreadThatReachedItSeesItBeforeTheOthers) {
  TransferEnd end;
  EXPECT_FALSE(end.reached());
  EXPECT_FALSE(end.is_visible());
  EXPECT_EQ(end.stats().requested_bytes, 0u);
  EXPECT_FALSE(end.wait_for(std::chrono::nanoseconds(0)));
  end.reach(std::nullopt, {.requested_bytes = 5});
  EXPECT_TRUE(end.reached());
  EXPECT_TRUE(end.is_visible());
  EXPECT_TRUE(end.wait_for(std::chrono::nanoseconds::max()));
  EXPECT_FALSE(visible_elsewhere(end)) << "the completion may still run";
  end.publish();
  EXPECT_TRUE(visible_elsewhere(end));
  EXPECT_EQ(end.failure(), nullptr);
  EXPECT_EQ(end.stats().requested_bytes, 5u);
}

TEST(TransferEndTest, ThreadsThatWaitAreWokenAndSeeTheFailure) {
  TransferEnd end;
  EXPECT_EQ(end.failure(), nullptr);
  auto waits = std::async(std::launch::async, [&end] {
    end.wait();
    return end.failure()->code;
  });
  end.reach(Failure(Error(Errc::kTruncated, "read")), {});
  end.publish();
  ASSERT_EQ(waits.wait_for(kHang), std::future_status::ready);
  EXPECT_EQ(waits.get(), Errc::kTruncated);
}

}  // namespace
}  // namespace flashpack::internal
