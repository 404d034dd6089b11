// In the program that counts allocations.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>

#include "flashpack/engine.h"
#include "tests/support/counted_new.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

TEST(FileWriterCostTest, AWriteCostsTheSameHoweverManyCameBefore) {
  const testing::TempDir dir;
  Engine engine({.staging_bytes = 8 << 20, .workers = 2});
  FileWriter writer = engine.create(dir / "file");
  std::uint64_t offset_bytes = 0;
  const auto allocations = [&] {
    const std::byte byte{1};
    offset_bytes += 10'000;
    testing::count_allocations(true);
    const int before = testing::counted_allocations();
    Transfer write = writer.start_write({.extents = {{offset_bytes, 1, &byte}}});
    const int count = testing::counted_allocations() - before;
    testing::count_allocations(false);
    write.wait();
    return count;
  };
  for (int i = 0; i < 10; ++i) allocations();
  const int early = allocations();
  for (int i = 0; i < 300; ++i) allocations();
  EXPECT_LE(allocations(), early + 10);
}

}  // namespace
}  // namespace flashpack
