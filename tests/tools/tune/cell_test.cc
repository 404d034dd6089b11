#include "tools/tune/cell.h"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

namespace flashpack::bench {
namespace {

TEST(Cells, LatenciesAreThoseOfTheRequestsWhateverTheirOrderAndNumber) {
  std::vector<double> seconds(200);
  std::iota(seconds.rbegin(), seconds.rend(), 1.0);
  const Latency many = latency_of(seconds);
  EXPECT_EQ(many.p50_s, 100.0);
  EXPECT_EQ(many.p95_s, 190.0);
  EXPECT_EQ(many.p99_s, 198.0);
  const Latency one = latency_of({3.0});
  EXPECT_EQ(one.p50_s, 3.0);
  EXPECT_EQ(one.p99_s, 3.0);
}

}  // namespace
}  // namespace flashpack::bench
