#include "engine/ground/cpu_quota.h"

#include <gtest/gtest.h>

#include <span>
#include <string_view>

#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

TEST(CpuQuota, ALimitIsInCpusAndNoneWhereThereIsNone) {
  const testing::TempDir dir;
  const auto quota_of = [&](std::string_view text) {
    testing::write_file(dir / "cpu.max", std::as_bytes(std::span(text)));
    return cpu_quota(dir / "cpu.max");
  };
  EXPECT_EQ(quota_of("150000 100000\n"), 1.5);
  for (const char* none : {"max 100000\n", "150000 0\n", "150000", ""}) EXPECT_EQ(quota_of(none), std::nullopt) << none;
  EXPECT_EQ(cpu_quota(dir / "missing"), std::nullopt);
}

}  // namespace
}  // namespace flashpack::internal
