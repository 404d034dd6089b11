#include "torch_binding/format/segments.h"

#include <gtest/gtest.h>

#include <fstream>
#include <numeric>
#include <vector>

namespace flashpack {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

// A file of uint8 tensors of the given sizes, one after the other.
Metadata bytes_file(const std::vector<std::int64_t>& sizes) {
  std::vector<TensorSpec> specs;
  for (const std::int64_t size : sizes) specs.push_back({std::to_string(specs.size()), DType::kUInt8, {size}});
  return make_layout(specs, 0);
}

std::vector<std::size_t> all_of(const Metadata& metadata) {
  std::vector<std::size_t> all(metadata.records.size());
  std::iota(all.begin(), all.end(), std::size_t{0});
  return all;
}

TEST(PlanSegments, NeighboursShareOneSegmentThatEndsWithTheLastOfThem) {
  const Metadata metadata = bytes_file({100, 50, 25});
  const auto segments = plan_segments(metadata, std::vector<std::size_t>{2, 1});
  ASSERT_EQ(segments.size(), 1U);
  EXPECT_EQ(segments[0].offset_bytes, 100U);
  EXPECT_EQ(segments[0].size_bytes, 75U);
  EXPECT_EQ(segments[0].records, (std::vector<std::size_t>{1, 2}));
}

TEST(PlanSegments, AGapOfUpToOneMiBIsReadAlongAndALongerOneIsNot) {
  const auto gap = static_cast<std::int64_t>(kMaxGapBytes);
  EXPECT_EQ(plan_segments(bytes_file({10, gap, 10}), std::vector<std::size_t>{0, 2}).size(), 1U);
  const auto split = plan_segments(bytes_file({10, gap + 1, 10}), std::vector<std::size_t>{0, 2});
  ASSERT_EQ(split.size(), 2U);
  EXPECT_EQ(split[0].size_bytes, 10U);
  EXPECT_EQ(split[1].offset_bytes, 10 + kMaxGapBytes + 1);
  EXPECT_EQ(split[1].size_bytes, 10U);
}

TEST(PlanSegments, SegmentsAreCutBetweenTensorsAndOnlyALargerTensorExceedsTheLimit) {
  const Metadata metadata = bytes_file({60, 40, 1, 250, 30});
  const auto segments = plan_segments(metadata, all_of(metadata), Verify::kAuto, 100);
  ASSERT_EQ(segments.size(), 4U);
  EXPECT_EQ(segments[0].records, (std::vector<std::size_t>{0, 1}));
  EXPECT_EQ(segments[1].records, (std::vector<std::size_t>{2}));
  EXPECT_EQ(segments[2].size_bytes, 250U);
  EXPECT_EQ(segments[3].records, (std::vector<std::size_t>{4}));
}

TEST(PlanSegments, EmptyTensorsAreInNoSegment) {
  const Metadata metadata = bytes_file({8, 0});
  EXPECT_TRUE(plan_segments(metadata, std::vector<std::size_t>{1}).empty());
  EXPECT_EQ(plan_segments(metadata, all_of(metadata))[0].records, (std::vector<std::size_t>{0}));
}

TEST(PlanSegments, ASegmentTakesInThePaddingThatFollowsItButNoTensor) {
  const std::vector<TensorSpec> specs = {
      {"a", DType::kUInt8, {100}}, {"b", DType::kUInt8, {7}}, {"c", DType::kUInt8, {0}}};
  const Metadata metadata = make_layout(specs, 128);
  const auto first = plan_segments(metadata, std::vector<std::size_t>{0});
  EXPECT_EQ(first[0].size_bytes, 100U);
  const auto cut = plan_segments(metadata, all_of(metadata), Verify::kAuto, 8);
  ASSERT_EQ(cut.size(), 2U);
  EXPECT_EQ(cut[0].size_bytes, 128U);
  EXPECT_EQ(cut[1].offset_bytes, 128U);
  EXPECT_EQ(cut[1].size_bytes, metadata.payload_bytes - 128);
}

TEST(PlanSegments, PaddingIsTakenInWhateverAlignmentTheFileAsksFor) {
  for (const std::uint64_t align_bytes : {(std::uint64_t{1} << 60) + 1, (std::uint64_t{1} << 63) - 1}) {
    const std::vector<TensorSpec> specs = {{"a", DType::kUInt8, {100}}};
    Metadata metadata = make_layout(specs, align_bytes);
    metadata.payload_bytes += 1000;
    EXPECT_EQ(plan_segments(metadata, all_of(metadata))[0].size_bytes, 1100U);
  }
}

TEST(PlanSegments, WhereAllIsToBeVerifiedSegmentsReachToTheBordersOfStripesWithoutOverlap) {
  const auto size = static_cast<std::int64_t>(kMiB);
  const Metadata metadata = bytes_file({size + 10, 10, 3 * size, 5});
  const auto middle = plan_segments(metadata, std::vector<std::size_t>{1}, Verify::kAlways);
  EXPECT_EQ(middle[0].offset_bytes, kMiB);
  EXPECT_EQ(middle[0].size_bytes, kMiB);
  const auto ends = plan_segments(metadata, std::vector<std::size_t>{0, 3}, Verify::kAlways);
  ASSERT_EQ(ends.size(), 2U);
  EXPECT_EQ(ends[0].size_bytes, 2 * kMiB);
  EXPECT_EQ(ends[1].offset_bytes, 4 * kMiB);
  EXPECT_EQ(ends[1].offset_bytes + ends[1].size_bytes, metadata.payload_bytes);
  const auto cut = plan_segments(metadata, all_of(metadata), Verify::kAlways, 8);
  for (std::size_t i = 1; i < cut.size(); ++i) {
    EXPECT_EQ(cut[i].offset_bytes, cut[i - 1].offset_bytes + cut[i - 1].size_bytes);
  }
}

TEST(HostRegion, DataAgreesWithTheFileOffsetModuloAPageOrAHugePage) {
  for (const std::uint64_t size : {std::uint64_t{1}, 5000 * std::uint64_t{1}, 2 * kMiB, 5 * kMiB + 3}) {
    for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{4097}, 2 * kMiB - 1, 3 * kMiB + 128}) {
      const HostRegion region(size, offset);
      const std::uint64_t granule = size < 2 * kMiB ? 4096 : 2 * kMiB;
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(region.data()) % granule, offset % granule);
      region.data()[0] = std::byte{1};
      region.data()[size - 1] = std::byte{2};
    }
  }
}

TEST(HostRegion, GivesItsMemoryBack) {
  const auto mapped_pages = [] {
    std::uint64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    return pages;
  };
  const std::uint64_t before = mapped_pages();
  {
    const HostRegion region(1024 * kMiB, 0);
  }
  EXPECT_LT(mapped_pages(), before + 1024 * kMiB / 4096);
}

TEST(HostRegion, MemoryThatCannotBeHadIsAnErrorOfTheSystem) {
  try {
    const HostRegion region(std::uint64_t{1} << 60, 0);
    FAIL() << "mapped an exbibyte";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), std::errc::not_enough_memory);
  }
}

}  // namespace
}  // namespace flashpack
