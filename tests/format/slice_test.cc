#include "flashpack/slice.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <numeric>
#include <random>

#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

TensorRecord record_of(std::vector<std::int64_t> shape) {
  std::uint64_t size_bytes = sizeof(std::uint32_t);
  for (const std::int64_t dim : shape) size_bytes *= static_cast<std::uint64_t>(dim);
  return {
      .name = "t", .dtype = DType::kUInt32, .shape = std::move(shape), .offset_bytes = 40, .size_bytes = size_bytes};
}

// The numbers that a slice has of a tensor whose elements are 0, 1, 2 and so on.
std::vector<std::uint32_t> numbers_of(const TensorRecord& record, std::span<const IndexRange> ranges) {
  std::vector<std::uint32_t> numbers = {0};
  for (std::size_t dim = 0; dim < ranges.size(); ++dim) {
    std::vector<std::uint32_t> inner;
    for (const std::uint32_t outer : numbers) {
      for (auto i = ranges[dim].begin; i < ranges[dim].end; ++i)
        inner.push_back(outer * static_cast<std::uint32_t>(record.shape[dim]) + static_cast<std::uint32_t>(i));
    }
    numbers = std::move(inner);
  }
  return numbers;
}

class SliceTest : public ::testing::Test {
 protected:
  // The result of a load of the slice, from a file of one tensor.
  std::vector<std::uint32_t> load(const TensorRecord& record, std::span<const IndexRange> ranges, std::size_t count) {
    std::vector<std::uint32_t> file((record.offset_bytes + record.size_bytes) / sizeof(std::uint32_t));
    std::iota(file.begin() + 10, file.end(), 0u);
    testing::write_file(dir_ / "file", std::as_bytes(std::span(file)));
    std::vector<std::uint32_t> target(count);
    engine_.load({.files = {{.path = dir_ / "file", .extents = slice_extents(record, ranges, target.data())}}});
    return target;
  }

  testing::TempDir dir_;
  Engine engine_{{.chunk_bytes = 1 << 20, .staging_bytes = 2 << 20, .workers = 2}};
};

TEST_F(SliceTest, AnySliceOfAnyShapeIsReadInTheOrderOfItsElements) {
  std::mt19937 random(3);
  const auto below = [&](std::int64_t limit) {
    return std::uniform_int_distribution<std::int64_t>(0, limit - 1)(random);
  };
  for (int round = 0; round < 100; ++round) {
    std::vector<std::int64_t> shape(random() % 5);
    for (std::int64_t& dim : shape) dim = 1 + below(7);
    std::vector<IndexRange> ranges;
    for (const std::int64_t dim : shape) {
      const bool whole = random() % 3 == 0;
      const std::int64_t begin = whole ? 0 : below(dim);
      ranges.push_back({begin, whole ? dim : begin + 1 + below(dim - begin)});
    }
    const TensorRecord record = record_of(shape);
    const std::vector<std::uint32_t> expected = numbers_of(record, ranges);
    ASSERT_EQ(load(record, ranges, expected.size()), expected) << "round " << round;
  }
}

TEST(SliceExtentsTest, ATensorWithoutElementsHasNoExtentHoweverLargeItsOtherDimsAre) {
  constexpr std::int64_t kHuge = std::int64_t{1} << 31;
  const TensorRecord record = record_of({0, kHuge, kHuge});
  const std::array<IndexRange, 3> half = {{{0, 0}, {0, kHuge}, {0, kHuge / 2}}};
  EXPECT_TRUE(slice_extents(record, half, nullptr).empty());
}

TEST(SliceExtentsTest, BytesThatAreNeighboursInTheFileAreOneExtent) {
  std::array<std::uint32_t, 4 * 5 * 6> memory{};
  const auto count = [&](std::array<IndexRange, 3> ranges) {
    return slice_extents(record_of({4, 5, 6}), ranges, memory.data()).size();
  };
  EXPECT_EQ(count({{{0, 4}, {0, 5}, {0, 6}}}), 1u);
  EXPECT_EQ(count({{{1, 3}, {0, 5}, {0, 6}}}), 1u);
  EXPECT_EQ(count({{{1, 3}, {1, 5}, {0, 6}}}), 2u);
  EXPECT_EQ(count({{{1, 2}, {1, 5}, {0, 6}}}), 1u);
  EXPECT_EQ(count({{{1, 3}, {1, 5}, {2, 3}}}), 8u);
  EXPECT_EQ(count({{{1, 3}, {2, 2}, {2, 3}}}), 0u);
}

TEST(SliceExtentsTest, RangesThatDoNotFitTheShapeAreRefused) {
  std::array<std::uint32_t, 20> memory{};
  const TensorRecord record = record_of({4, 5});
  const auto error_of = [&](const std::vector<IndexRange>& ranges) -> std::string {
    try {
      slice_extents(record, ranges, memory.data());
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kInvalidArgument);
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(error_of({{0, 4}}), "slice t: 1 ranges for 2 dims: invalid argument");
  EXPECT_EQ(error_of({{0, 4}, {0, 6}}), "slice t: from 0 to 6 of a dim of 5: invalid argument");
  EXPECT_EQ(error_of({{3, 2}, {0, 5}}), "slice t: from 3 to 2 of a dim of 4: invalid argument");
  EXPECT_EQ(error_of({{-1, 2}, {0, 5}}), "slice t: from -1 to 2 of a dim of 4: invalid argument");
}

}  // namespace
}  // namespace flashpack
