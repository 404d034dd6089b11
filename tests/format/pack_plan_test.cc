#include "torch_binding/format/pack_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <span>
#include <utility>
#include <vector>

namespace flashpack {
namespace {

using Form = PackSource::Form;

constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kBuffer = 8 * kPage;
constexpr std::uint64_t kPart = kBuffer / 4;

std::uint64_t elems_of(std::span<const std::int64_t> dims) {
  std::uint64_t elems = 1;
  for (const std::int64_t dim : dims) elems *= static_cast<std::uint64_t>(dim);
  return elems;
}

/// Whether `elems` from `first` on are whole slices of `dims`: one index for each of some first dims, then a range.
bool is_slice(std::span<const std::int64_t> dims, std::uint64_t first, std::uint64_t elems) {
  while (elems < elems_of(dims)) {
    const std::uint64_t row = elems_of(dims.subspan(1));
    if (elems > row) return elems % row == 0 && first % row == 0 && first + elems <= elems_of(dims);
    first %= row;
    dims = dims.subspan(1);
  }
  return elems == elems_of(dims) && first == 0;
}

/// A slice of several dims whose elements are far apart, on the host.
void check_scratch(const PackSource& source, const PackStep& step) {
  const bool may = source.form == Form::kTransposed && !source.on_device && source.shape.size() > 1;
  const bool must = may && step.elems > static_cast<std::uint64_t>(source.shape.back());
  EXPECT_LE(step.scratch_offset_bytes.has_value(), may);
  EXPECT_GE(step.scratch_offset_bytes.has_value(), must);
}

/// Checks that a group takes its parts of one buffer in order, within the buffer, and in the phase of the file, because
/// the engine writes only such parts in place.
void check_room(const std::vector<PackSource>& sources, const PackGroup& group, bool on_device) {
  std::uint64_t used = 0;
  for (const PackStep& step : group) {
    const PackSource& source = sources[step.source];
    if (!step.buffer_offset_bytes || source.on_device != on_device) continue;
    const std::uint64_t size = step.elems * source.element_bytes;
    EXPECT_GE(*step.buffer_offset_bytes, used);
    EXPECT_EQ(*step.buffer_offset_bytes % kPage,
              (source.offset_bytes + step.first_elem * source.element_bytes) % kPage);
    used = *step.buffer_offset_bytes + size;
    EXPECT_LE(used, kBuffer);
    if (!step.scratch_offset_bytes) continue;
    EXPECT_GE(*step.scratch_offset_bytes, used);
    EXPECT_LE(*step.scratch_offset_bytes + size, kBuffer);
  }
}

TEST(PackPlan, WhatIsReadyIsWrittenFromWhereItLiesInOneGroup) {
  const std::array shape = {std::int64_t{1} << 40};
  const std::vector<PackSource> sources(3, {.element_bytes = 2, .shape = shape});
  const auto groups = plan_pack(sources);
  ASSERT_EQ(groups.size(), 1U);
  ASSERT_EQ(groups[0].size(), 3U);
  for (const PackStep& step : groups[0]) {
    EXPECT_FALSE(step.buffer_offset_bytes);
    EXPECT_EQ(step.elems, std::uint64_t{1} << 40);
  }
}

TEST(PackPlan, EveryElementIsWrittenOnceInOrderFromRoomOfItsOwn) {
  std::mt19937 random(7);
  const auto below = [&](std::size_t limit) { return static_cast<std::size_t>(random()) % limit; };
  for (int round = 0; round < 100; ++round) {
    std::vector<std::vector<std::int64_t>> shapes;
    for (std::size_t count = 1 + below(20); shapes.size() < count;) {
      const std::size_t longest = below(4) == 0 ? 6000 : 40;
      shapes.emplace_back();
      for (std::size_t dims = below(5); shapes.back().size() < dims;) {
        shapes.back().push_back(static_cast<std::int64_t>(below(shapes.back().empty() ? longest : 30)));
      }
    }
    std::vector<PackSource> sources;
    std::uint64_t offset_bytes = 0;
    for (const auto& shape : shapes) {
      sources.push_back({.form = static_cast<Form>(below(4)),
                         .on_device = below(3) == 0,
                         .element_bytes = 1U << below(5),
                         .offset_bytes = offset_bytes += 16 * below(500),
                         .shape = shape});
      offset_bytes += elems_of(shape) * sources.back().element_bytes;
    }
    std::vector<std::uint64_t> written(sources.size());
    for (const PackGroup& group : plan_pack(sources, kBuffer)) {
      EXPECT_FALSE(group.empty());
      for (const PackStep& step : group) {
        const PackSource& source = sources[step.source];
        EXPECT_EQ(step.first_elem, std::exchange(written[step.source], step.first_elem + step.elems));
        EXPECT_EQ(step.buffer_offset_bytes.has_value(), source.form != Form::kReady);
        check_scratch(source, step);
        EXPECT_TRUE(source.form == Form::kContiguous || is_slice(source.shape, step.first_elem, step.elems));
      }
      check_room(sources, group, false);
      check_room(sources, group, true);
    }
    for (std::size_t i = 0; i < sources.size(); ++i) EXPECT_EQ(written[i], elems_of(shapes[i]));
  }
}

TEST(PackPlan, PartsOfWhatIsLargeEndAtMultiplesInTheFileSoThatWholeChunksAreWritten) {
  const std::array shape = {std::int64_t{100'000}};
  const std::vector<PackSource> sources = {
      {.form = Form::kContiguous, .element_bytes = 4, .offset_bytes = 64, .shape = shape}};
  const auto groups = plan_pack(sources, kBuffer);
  for (const PackGroup& group : groups) {
    for (const PackStep& step : group) {
      const std::uint64_t end = 64 + (step.first_elem + step.elems) * 4;
      EXPECT_TRUE(end % kPart == 0 || step.first_elem + step.elems == 100'000) << end;
    }
  }
  EXPECT_EQ(groups.size(), 400'000 / kBuffer + 1);
}

TEST(PackPlan, WhatFitsIntoABufferIsNotCut) {
  const std::array shape = {std::int64_t{7}, std::int64_t{1000}};
  const std::vector<PackSource> sources(5, {.form = Form::kStrided, .element_bytes = 4, .shape = shape});
  const auto groups = plan_pack(sources, kBuffer);
  ASSERT_EQ(groups.size(), 5U);
  for (const PackGroup& group : groups) EXPECT_EQ(group.size(), 1U);
}

TEST(PackPlan, BuffersOfHostAndDeviceAreFilledSideBySide) {
  const std::array shape = {static_cast<std::int64_t>(kBuffer - kPage)};
  std::vector<PackSource> sources(2, {.form = Form::kContiguous, .shape = shape});
  sources[1].on_device = true;
  EXPECT_EQ(plan_pack(sources, kBuffer).size(), 1U);
  sources[1].on_device = false;
  EXPECT_EQ(plan_pack(sources, kBuffer).size(), 2U);
}

}  // namespace
}  // namespace flashpack
