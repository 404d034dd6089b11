#include "tools/tune/limit.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "tests/support/units.h"
#include "tools/tune/rounds.h"

namespace flashpack::bench {
namespace {

using testing::kMiB;

Cell cell(std::uint32_t chunk_mib, std::uint32_t depth, double gb_per_s, double cpu_s_per_gb,
          std::uint32_t workers = 0) {
  return {{chunk_mib * kMiB, depth, workers}, kEnoughSamples, gb_per_s, cpu_s_per_gb};
}

TEST(Limit, TheLimitIsTheCeilingThatTheBestIsNearTo) {
  const auto begin_of = [](double gb_per_s, double cpu_s_per_gb, const Ceilings& ceilings) {
    const std::string text = limit_of(cell(4, 8, gb_per_s, cpu_s_per_gb), "disk", ceilings);
    return text.substr(0, text.find(':'));
  };
  EXPECT_EQ(begin_of(50, 0.1, {.link = 55, .copies = 50, .cores = 16}), "link");
  EXPECT_EQ(begin_of(44, 0.1, {.link = 55, .copies = 50, .cores = 16}), "memory");
  EXPECT_EQ(begin_of(44, 0.3, {.link = 55, .copies = 0, .cores = 16}), "CPU");
  EXPECT_EQ(begin_of(44, 0.2, {.link = 55, .copies = 0, .cores = 16}), "disk");
  EXPECT_EQ(begin_of(3, 0.02, {.cores = 2}), "disk");
}

}  // namespace
}  // namespace flashpack::bench
