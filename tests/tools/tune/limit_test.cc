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
  EXPECT_EQ(begin_of(3, 0.5, {.cores = 1.5}), "CPU");
}

TEST(Limit, TheDiskIsTheLimitOnlyWhereItsPlainReadsAreHardlyFaster) {
  const auto text_of = [](double gb_per_s, double cpu_s_per_gb) {
    return limit_of(cell(4, 8, gb_per_s, cpu_s_per_gb), "something", {.disk = 3, .cores = 2});
  };
  EXPECT_EQ(text_of(2.75, 0.1), "disk: its plain reads reach 3.00 GB/s");
  EXPECT_EQ(text_of(2.75, 0.7), "disk: its plain reads reach 3.00 GB/s");
  EXPECT_EQ(text_of(2.5, 0.1), "not the disk, whose plain reads reach 3.00 GB/s: 0.2 of 2 cores were busy");
  EXPECT_EQ(text_of(2.5, 0.7), "CPU: 1.8 of 2 cores were busy");
  EXPECT_EQ(limit_of(cell(4, 8, 2.5, 0.1), "something", {.disk = 2.6, .plain = "writes", .cores = 2}),
            "disk: its plain writes reach 2.60 GB/s");
}

}  // namespace
}  // namespace flashpack::bench
