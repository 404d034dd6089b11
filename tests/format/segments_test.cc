#include "torch_binding/format/segments.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <span>
#include <tuple>
#include <vector>

#include "engine/ground/units.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

using internal::kMiB;

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

using Indices = std::vector<std::size_t>;

SegmentPlan plan_on_host(const Metadata& metadata, const Indices& wanted, Verify verify = Verify::kAuto,
                         std::uint64_t max_segment_bytes = kMaxSegmentBytes) {
  return plan_segments(metadata, wanted, Device::Kind::kHost, verify, max_segment_bytes);
}

// For each of the wanted tensors the segment that it is in.
Indices segments_of(const SegmentPlan& plan) {
  Indices segments;
  for (const SegmentPlan::Place& place : plan.places) segments.push_back(place.segment);
  return segments;
}

constexpr std::size_t kNowhere = SegmentPlan::Place::kNowhere;

TEST(PlanSegments, NeighboursShareOneSegmentThatEndsWithTheLastOfThem) {
  const Metadata metadata = bytes_file({100, 50, 25});
  const SegmentPlan plan = plan_on_host(metadata, {2, 1});
  ASSERT_EQ(plan.segments.size(), 1U);
  EXPECT_EQ(plan.segments[0].offset_bytes, 100U);
  EXPECT_EQ(plan.segments[0].size_bytes, 75U);
  ASSERT_EQ(segments_of(plan), (Indices{0, 0}));
  EXPECT_EQ(plan.places[0].offset_bytes, 50U);
  EXPECT_EQ(plan.places[1].offset_bytes, 0U);
}

TEST(PlanSegments, AGapOfUpToOneMiBIsReadAlongAndALongerOneIsNot) {
  const auto gap = static_cast<std::int64_t>(kMaxUnwantedBytes);
  EXPECT_EQ(plan_on_host(bytes_file({10, gap, 10}), {0, 2}).segments.size(), 1U);
  const auto split = plan_on_host(bytes_file({10, gap + 1, 10}), {0, 2}).segments;
  ASSERT_EQ(split.size(), 2U);
  EXPECT_EQ(split[0].size_bytes, 10U);
  EXPECT_EQ(split[1].offset_bytes, 10 + kMaxUnwantedBytes + 1);
  EXPECT_EQ(split[1].size_bytes, 10U);
}

TEST(PlanSegments, SegmentsAreCutBetweenTensorsAndOnlyALargerTensorExceedsTheLimit) {
  const Metadata metadata = bytes_file({60, 40, 1, 250, 30});
  const SegmentPlan plan = plan_on_host(metadata, all_of(metadata), Verify::kAuto, 100);
  EXPECT_EQ(segments_of(plan), (Indices{0, 0, 1, 2, 3}));
  EXPECT_EQ(plan.segments[2].size_bytes, 250U);
}

TEST(PlanSegments, EmptyTensorsAreInNoSegment) {
  const Metadata metadata = bytes_file({8, 0});
  EXPECT_TRUE(plan_on_host(metadata, {1}).segments.empty());
  EXPECT_EQ(segments_of(plan_on_host(metadata, {1, 0})), (Indices{kNowhere, 0}));
}

TEST(PlanSegments, ASegmentTakesInThePaddingThatFollowsItButNoTensor) {
  const std::vector<TensorSpec> specs = {
      {"a", DType::kUInt8, {100}}, {"b", DType::kUInt8, {7}}, {"c", DType::kUInt8, {0}}};
  const Metadata metadata = make_layout(specs, 128);
  EXPECT_EQ(plan_on_host(metadata, {0}).segments[0].size_bytes, 100U);
  const auto cut = plan_on_host(metadata, all_of(metadata), Verify::kAuto, 8).segments;
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
    EXPECT_EQ(plan_on_host(metadata, all_of(metadata)).segments[0].size_bytes, 1100U);
  }
}

TEST(PlanSegments, WhereAllIsToBeVerifiedSegmentsReachToTheBordersOfStripesWithoutOverlap) {
  const auto size = static_cast<std::int64_t>(kMiB);
  const Metadata metadata = bytes_file({size + 10, 10, 3 * size, 5});
  const SegmentPlan middle = plan_on_host(metadata, {1}, Verify::kAlways);
  EXPECT_EQ(middle.segments[0].offset_bytes, kMiB);
  EXPECT_EQ(middle.segments[0].size_bytes, kMiB);
  EXPECT_EQ(middle.places[0].offset_bytes, 10U);
  const auto ends = plan_on_host(metadata, {0, 3}, Verify::kAlways).segments;
  ASSERT_EQ(ends.size(), 2U);
  EXPECT_EQ(ends[0].size_bytes, 2 * kMiB);
  EXPECT_EQ(ends[1].offset_bytes, 4 * kMiB);
  EXPECT_EQ(ends[1].offset_bytes + ends[1].size_bytes, metadata.payload_bytes);
  const auto cut = plan_on_host(metadata, all_of(metadata), Verify::kAlways, 8).segments;
  for (std::size_t i = 1; i < cut.size(); ++i) {
    EXPECT_EQ(cut[i].offset_bytes, cut[i - 1].offset_bytes + cut[i - 1].size_bytes);
  }
}

TEST(PlanSegments, OnTheHostEverySegmentIsABlockForItsPlaceInTheFile) {
  const Metadata metadata = bytes_file({60, 40, 1, 250, 30});
  const SegmentPlan plan = plan_on_host(metadata, all_of(metadata), Verify::kAlways, 100);
  ASSERT_EQ(plan.blocks.size(), plan.segments.size());
  for (std::size_t i = 0; i < plan.segments.size(); ++i) {
    EXPECT_EQ(plan.segments[i].block, i);
    EXPECT_EQ(plan.segments[i].block_offset, 0U);
    EXPECT_EQ(plan.blocks[i].size_bytes, plan.segments[i].size_bytes);
    EXPECT_EQ(plan.blocks[i].phase_bytes, plan.segments[i].offset_bytes);
  }
}

class PlanOnADevice : public ::testing::TestWithParam<std::tuple<std::uint64_t, Verify>> {
 protected:
  // Small tensors and large ones, the other way round in the file, and some between them that are not wanted.
  PlanOnADevice() : metadata_(mixed_file(std::get<0>(GetParam()))) {
    for (std::size_t i = metadata_.records.size(); i-- > 0;) {
      if (i % 7 != 3) wanted_.push_back(i);
    }
    plan_ = plan_segments(metadata_, wanted_, Device::Kind::kCuda, std::get<1>(GetParam()), 16 * kMiB);
  }

  static Metadata mixed_file(std::uint64_t align_bytes) {
    std::vector<TensorSpec> specs;
    for (std::int64_t i = 0; i < 200; ++i) {
      const std::int64_t size = i % 10 == 9 ? (2 << 20) + 77 * i : 1 + 977 * i % 90'000;
      specs.push_back({std::to_string(i), DType::kUInt8, {size}});
    }
    return make_layout(specs, align_bytes);
  }

  Metadata metadata_;
  Indices wanted_;
  SegmentPlan plan_;
};

INSTANTIATE_TEST_SUITE_P(Files, PlanOnADevice,
                         ::testing::Combine(::testing::Values(0, 24, 128, 4096),
                                            ::testing::Values(Verify::kAuto, Verify::kAlways)));

TEST_P(PlanOnADevice, EveryTensorIsReadToAMultipleOf256Bytes) {
  for (std::size_t i = 0; i < wanted_.size(); ++i) {
    const TensorRecord& record = metadata_.records[wanted_[i]];
    const SegmentPlan::Place& place = plan_.places[i];
    const Segment& segment = plan_.segments.at(place.segment);
    EXPECT_EQ(segment.offset_bytes + place.offset_bytes, record.offset_bytes);
    EXPECT_LE(place.offset_bytes + record.size_bytes, segment.size_bytes);
    EXPECT_EQ(plan_.block_offset(place) % kDeviceAlignBytes, 0U);
  }
}

TEST_P(PlanOnADevice, SegmentsOverlapNeitherInTheFileNorInTheirBlocks) {
  std::vector<std::uint64_t> used(plan_.blocks.size());
  std::uint64_t end = 0;
  for (const Segment& segment : plan_.segments) {
    EXPECT_GE(segment.offset_bytes, end);
    end = segment.offset_bytes + segment.size_bytes;
    EXPECT_GE(segment.block_offset, used.at(segment.block));
    used[segment.block] = segment.block_offset + segment.size_bytes;
  }
  EXPECT_LE(end, metadata_.payload_bytes);
  for (std::size_t i = 0; i < used.size(); ++i) EXPECT_EQ(used[i], plan_.blocks[i].size_bytes);
}

TEST_P(PlanOnADevice, BlocksOfSmallTensorsAreSmallAndNoneIsLargerThanASegmentMayBe) {
  Indices with_small;
  for (std::size_t i = 0; i < wanted_.size(); ++i) {
    if (metadata_.records[wanted_[i]].size_bytes >= kMiB) continue;
    const Segment& segment = plan_.segments[plan_.places[i].segment];
    if (segment.size_bytes <= 2 * kMiB) with_small.push_back(segment.block);
  }
  EXPECT_FALSE(with_small.empty());
  for (const std::size_t block : with_small) EXPECT_LE(plan_.blocks[block].size_bytes, 2 * kMiB);
  for (const SegmentPlan::Block& block : plan_.blocks) EXPECT_LE(block.size_bytes, 16 * kMiB);
}

/// The records of a safetensors file whose payload begins at `begin`, one after the other.
Metadata safetensors_file(std::uint64_t begin, const std::vector<std::pair<DType, std::int64_t>>& tensors) {
  Metadata metadata{.format = FileFormat::kSafetensors, .payload_bytes = begin};
  for (const auto& [dtype, elems] : tensors) {
    const std::uint64_t size_bytes = static_cast<std::uint64_t>(elems) * element_bytes(dtype);
    metadata.records.push_back({.name = std::to_string(metadata.records.size()),
                                .dtype = dtype,
                                .shape = {elems},
                                .offset_bytes = metadata.payload_bytes,
                                .size_bytes = size_bytes});
    metadata.payload_bytes += size_bytes;
  }
  return metadata;
}

TEST(PlanSegments, AlignedTensorsOfASafetensorsFileAreOneSegmentOfTheFilesPhase) {
  const Metadata metadata = safetensors_file(1000, {{DType::kInt64, 3}, {DType::kFloat32, 1}, {DType::kUInt8, 7}});
  const SegmentPlan plan = plan_on_host(metadata, all_of(metadata));
  ASSERT_EQ(plan.blocks.size(), 1U);
  EXPECT_EQ(plan.blocks[0].phase_bytes, 1000U);
  EXPECT_EQ(segments_of(plan), (Indices{0, 0, 0}));
}

TEST(PlanSegments, TensorsThatAreAllShiftedByTheSameAreOneAlignedSegment) {
  const Metadata metadata = safetensors_file(1001, {{DType::kInt64, 3}, {DType::kFloat32, 1}, {DType::kUInt8, 7}});
  const SegmentPlan plan = plan_on_host(metadata, all_of(metadata));
  EXPECT_EQ(segments_of(plan), (Indices{0, 0, 0}));
  EXPECT_EQ(plan.blocks[0].phase_bytes, 0U);
  EXPECT_EQ(plan.block_offset(plan.places[0]), 0U);
}

TEST(PlanSegments, ALargeAlignedTensorIsReadInPlaceWhateverItsNeighboursAre) {
  const auto size = static_cast<std::int64_t>(3 * kMiB);
  const Metadata metadata = safetensors_file(1001, {{DType::kFloat32, 5}, {DType::kUInt8, 7}, {DType::kFloat32, size}});
  const SegmentPlan plan = plan_on_host(metadata, {0, 2});
  EXPECT_EQ(plan.segments[plan.places[1].segment].offset_bytes, 1028U);
  EXPECT_EQ(plan.blocks[plan.segments[plan.places[1].segment].block].phase_bytes, 1028U);
}

TEST(PlanSegments, ManySmallTensorsThatAreShiftedInTurnShareFewBlocks) {
  std::vector<std::pair<DType, std::int64_t>> tensors;
  for (int i = 0; i < 30'000; ++i) tensors.insert(tensors.end(), {{DType::kFloat8E4M3FN, 501}, {DType::kFloat32, 1}});
  const Metadata metadata = safetensors_file(1000, tensors);
  for (const auto kind : {Device::Kind::kHost, Device::Kind::kCuda}) {
    const SegmentPlan plan = plan_segments(metadata, all_of(metadata), kind);
    EXPECT_LT(plan.blocks.size(), 25U);
  }
}

/// Memory for the blocks of a plan, at addresses of their phases, filled as a load does it.
class Loaded {
 public:
  Loaded(const SegmentPlan& plan, std::span<const std::byte> file) : plan_(plan) {
    for (const SegmentPlan::Block& block : plan.blocks) memory_.emplace_back(block.size_bytes, std::byte{0xee});
    for (const Segment& segment : plan.segments) {
      const auto from = file.subspan(segment.offset_bytes, segment.size_bytes);
      std::memcpy(memory_[segment.block].data() + segment.block_offset, from.data(), from.size());
    }
  }

  std::span<const std::byte> bytes(const SegmentPlan::Place& place, std::uint64_t size_bytes) const {
    const std::size_t block = plan_.segments[place.segment].block;
    return std::span(memory_[block]).subspan(plan_.block_offset(place), size_bytes);
  }
  std::uint64_t address_in_page(const SegmentPlan::Place& place) const {
    return plan_.blocks[plan_.segments[place.segment].block].phase_bytes + plan_.block_offset(place);
  }

 private:
  const SegmentPlan& plan_;
  std::vector<std::vector<std::byte>> memory_;
};

class RandomLayout : public ::testing::TestWithParam<unsigned> {
 protected:
  RandomLayout() {
    std::vector<std::pair<DType, std::int64_t>> tensors;
    for (int i = 0; i < 200; ++i) {
      const auto dtype = static_cast<DType>(number(0, static_cast<std::uint64_t>(DType::kFloat4E2M1FNX2)));
      const std::uint64_t most = number(0, 9) == 0 ? 150'000 : 300;
      tensors.emplace_back(dtype, static_cast<std::int64_t>(number(0, most)));
    }
    metadata_ = safetensors_file(number(10, 5000), tensors);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (number(0, 3) > 0) wanted_.push_back(i);
    }
    std::ranges::shuffle(wanted_, random_);
    file_ = testing::random_bytes(metadata_.payload_bytes, GetParam());
  }

  std::uint64_t number(std::uint64_t least, std::uint64_t most) {
    return std::uniform_int_distribution<std::uint64_t>(least, most)(random_);
  }

  std::mt19937_64 random_{GetParam()};
  Metadata metadata_;
  Indices wanted_;
  std::vector<std::byte> file_;
};

INSTANTIATE_TEST_SUITE_P(Seeds, RandomLayout, ::testing::Range(0U, 10U));

TEST_P(RandomLayout, EveryTensorGetsItsBytesAndIsAligned) {
  for (const auto kind : {Device::Kind::kHost, Device::Kind::kCuda}) {
    const SegmentPlan plan = plan_segments(metadata_, wanted_, kind, Verify::kAuto, 4 * kMiB);
    const Loaded loaded(plan, file_);
    for (std::size_t i = 0; i < wanted_.size(); ++i) {
      const TensorRecord& record = metadata_.records[wanted_[i]];
      if (record.size_bytes == 0) continue;
      const auto expected = std::span(file_).subspan(record.offset_bytes, record.size_bytes);
      EXPECT_TRUE(std::ranges::equal(loaded.bytes(plan.places[i], record.size_bytes), expected));
      const bool on_device = kind != Device::Kind::kHost;
      const std::uint64_t place =
          on_device ? plan.block_offset(plan.places[i]) : loaded.address_in_page(plan.places[i]);
      EXPECT_EQ(place % (on_device ? kDeviceAlignBytes : element_bytes(record.dtype)), 0U);
    }
  }
}

TEST_P(RandomLayout, SegmentsOverlapNeitherInTheFileNorInTheirBlocks) {
  for (const auto kind : {Device::Kind::kHost, Device::Kind::kCuda}) {
    const SegmentPlan plan = plan_segments(metadata_, wanted_, kind, Verify::kAuto, 4 * kMiB);
    std::uint64_t end = 0;
    std::vector<std::uint64_t> used(plan.blocks.size());
    for (const Segment& segment : plan.segments) {
      EXPECT_GE(segment.offset_bytes, end);
      end = segment.offset_bytes + segment.size_bytes;
      EXPECT_GE(segment.block_offset, used.at(segment.block));
      used[segment.block] = segment.block_offset + segment.size_bytes;
      EXPECT_LE(used[segment.block], plan.blocks[segment.block].size_bytes);
    }
  }
}

TEST(PlanSegments, FilesOfACheckpointShareNeitherSegmentsNorBlocks) {
  const auto named = [](Metadata metadata, const std::string& prefix) {
    for (TensorRecord& record : metadata.records) record.name = prefix + record.name;
    return metadata;
  };
  std::vector<CheckpointFile> files(2);
  files[0].path = "1";
  files[0].metadata = named(bytes_file({10, 20, 5}), "a");
  files[1].path = "2";
  files[1].metadata = named(bytes_file({7, 30}), "b");
  const Checkpoint checkpoint("all", std::move(files));
  // Tensors are counted file by file.
  const Indices wanted = {4, 0, 3, 2};
  for (const auto kind : {Device::Kind::kHost, Device::Kind::kCuda}) {
    const SegmentPlan plan = plan_segments(checkpoint, wanted, kind);
    std::vector<std::size_t> file_of_block(plan.blocks.size(), ~std::size_t{0});
    for (const Segment& segment : plan.segments) {
      std::size_t& file = file_of_block.at(segment.block);
      EXPECT_TRUE(file == ~std::size_t{0} || file == segment.file);
      file = segment.file;
    }
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      const Segment& segment = plan.segments.at(plan.places[i].segment);
      EXPECT_EQ(segment.file, checkpoint.file_of(wanted[i]));
      EXPECT_EQ(segment.offset_bytes + plan.places[i].offset_bytes, checkpoint.record(wanted[i]).offset_bytes);
    }
  }
}

TEST(PlanSegments, MacroblocksArePlannedAsTensorsAre) {
  const std::vector<TensorSpec> specs = {{"a", DType::kFloat32, {3}}, {"b", DType::kInt8, {5}}};
  const Metadata blocks = macroblocks_as_records(make_layout(specs, 16));
  ASSERT_EQ(blocks.records.size(), 2U);
  EXPECT_EQ(blocks.records[1].dtype, DType::kInt8);
  EXPECT_EQ(blocks.records[1].shape, std::vector<std::int64_t>{5});
  const SegmentPlan plan = plan_on_host(blocks, {0, 1});
  EXPECT_EQ(plan.segments[0].size_bytes, 21U);
  EXPECT_EQ(plan.places[1].offset_bytes, 16U);
}

}  // namespace
}  // namespace flashpack
