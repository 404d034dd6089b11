#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>

#include "flashpack/format.h"

namespace flashpack {
namespace {

using Order = std::vector<std::size_t>;

std::string error_of(const auto& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kInvalidArgument);
    return error.what();
  }
  return "accepted";
}

std::string layout_error(std::vector<TensorSpec> tensors, std::uint64_t align_bytes = 0) {
  return error_of([&] { make_layout(tensors, align_bytes); });
}

bool contains(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

const std::vector<TensorSpec> kTensors = {
    {"a", DType::kFloat32, {2}}, {"b", DType::kInt8, {3}}, {"c", DType::kFloat32, {}}, {"d", DType::kInt8, {3}}};

TEST(FileOrder, IsLargestFirstAndTiesAsGiven) { EXPECT_EQ(file_order(kTensors), (Order{1, 3, 0, 2})); }

TEST(FileOrder, OfNamesPassesOverUnknownAndLeavesOutUnlisted) {
  const std::vector<std::string> names = {"c", "zzz", "a"};
  EXPECT_EQ(file_order(kTensors, names), (Order{2, 0}));
}

TEST(FileOrder, OfNoNamesIsEmpty) { EXPECT_EQ(file_order(kTensors, std::vector<std::string>{}), Order{}); }

TEST(FileOrder, RefusesANameListedTwice) {
  const std::vector<std::string> names = {"c", "a", "c"};
  EXPECT_TRUE(contains(error_of([&] { file_order(kTensors, names); }), R"(name_order lists "c" twice)"));
}

TEST(Layout, GroupsByDTypeInOrderOfFirstAppearance) {
  const Metadata metadata = make_layout(kTensors, 8);
  const Container& container = metadata.container;
  ASSERT_EQ(container.version, 4U);
  ASSERT_EQ(container.macroblocks.size(), 2U);
  EXPECT_EQ(container.macroblocks[0].dtype, DType::kFloat32);
  EXPECT_EQ(container.macroblocks[1].offset_bytes, 16U);
  EXPECT_EQ(metadata.records[1].name, "c");
  EXPECT_EQ(metadata.records[1].offset_bytes, 8U);
  EXPECT_EQ(metadata.records[3].name, "d");
  EXPECT_EQ(metadata.records[3].offset_bytes, 24U);
  EXPECT_EQ(metadata.payload_bytes, 27U);
  EXPECT_EQ(container.total_elems, 14U);
}

TEST(Layout, RefusesNoTensors) { EXPECT_TRUE(contains(layout_error({}), "No tensors to pack.")); }

TEST(Layout, OfTensorsWithoutAByteHasNoPayload) {
  const Metadata layout =
      make_layout(std::vector<TensorSpec>{{"e", DType::kInt8, {0}}, {"f", DType::kFloat32, {2, 0}}}, 128);
  EXPECT_EQ(layout.payload_bytes, 0U);
  EXPECT_EQ(layout.records.size(), 2U);
}

TEST(Layout, RefusesANameTwice) {
  EXPECT_TRUE(contains(layout_error({{"w", DType::kInt8, {1}}, {"w", DType::kInt8, {1}}}),
                       R"(pack tensor "w": its name stands twice)"));
}

TEST(Layout, RefusesNamesThatAreNotUtf8) {
  for (const char* name : {"\xff", "a\xc3", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80"}) {
    EXPECT_TRUE(contains(layout_error({{name, DType::kInt8, {1}}}), "its name is not UTF-8"));
  }
  EXPECT_EQ(layout_error({{"\xf4\x8f\xbf\xbf é漢😀", DType::kInt8, {1}}}), "accepted");
}

TEST(Layout, RefusesShapesWithoutASize) {
  constexpr std::int64_t kHuge = std::int64_t{1} << 62;
  for (const std::vector<std::int64_t>& shape :
       {std::vector<std::int64_t>{-1}, {kHuge, 2}, {kHuge, 0, kHuge}, std::vector<std::int64_t>(65, 1)}) {
    EXPECT_TRUE(contains(layout_error({{"w", DType::kInt8, shape}}), R"(pack tensor "w": its shape)"));
  }
}

TEST(Layout, RefusesFilesPastInt64) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
  constexpr std::string_view kPast = "the file would pass 2^63 bytes";
  EXPECT_TRUE(contains(layout_error({{"w", DType::kFloat32, {kMax}}}), kPast));
  EXPECT_TRUE(contains(layout_error({{"v", DType::kInt8, {kMax}}, {"w", DType::kInt8, {1}}}), kPast));
  EXPECT_TRUE(contains(layout_error({{"v", DType::kInt8, {kMax}}, {"w", DType::kUInt8, {1}}}), kPast));
  EXPECT_TRUE(contains(layout_error({{"v", DType::kInt8, {kMax}}, {"w", DType::kInt8, {0}}}, 16), kPast));
  EXPECT_TRUE(contains(layout_error({{"w", DType::kComplex128, {1}}}, kMax), kPast));
  EXPECT_TRUE(contains(layout_error({{"w", DType::kFloat32, {1}}}, (std::uint64_t{1} << 61) + 1), kPast));
  EXPECT_TRUE(contains(layout_error({{"w", DType::kInt8, {1}}}, std::uint64_t{1} << 63), "align_bytes must be"));
  EXPECT_EQ(layout_error({{"w", DType::kInt8, {kMax}}}), "accepted");
}

class RandomTensors {
 public:
  explicit RandomTensors(std::uint32_t seed) : random_(seed) {}

  std::uint64_t below(std::uint64_t limit) { return random_() % limit; }

  std::vector<TensorSpec> list() {
    std::vector<TensorSpec> tensors(1 + below(40));
    const std::uint64_t dtypes = 1 + below(4);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      tensors[i].name = name(i);
      tensors[i].dtype = static_cast<DType>((below(dtypes) * 7) % 21);
      tensors[i].shape.resize(below(5));
      for (std::int64_t& dim : tensors[i].shape) dim = static_cast<std::int64_t>(below(6));
    }
    return tensors;
  }

 private:
  std::string name(std::size_t i) {
    static const std::vector<std::string> kParts = {"layer.",           "\"", "\\", "/", "\b\f\n\r\t",
                                                    {0, 1, 0x1f, 0x7f}, "é",  "漢", "😀"};
    std::string name = kParts[below(kParts.size())] + std::to_string(i);
    return name + kParts[below(kParts.size())];
  }

  std::mt19937 random_;
};

void expect_equal(const Metadata& a, const Metadata& b) {
  EXPECT_EQ(a.container.version, b.container.version);
  EXPECT_EQ(a.container.align_bytes, b.container.align_bytes);
  EXPECT_EQ(a.container.total_elems, b.container.total_elems);
  EXPECT_EQ(a.container.macroblock_of, b.container.macroblock_of);
  EXPECT_EQ(a.payload_bytes, b.payload_bytes);
  EXPECT_EQ(a.warnings, b.warnings);
  ASSERT_EQ(a.container.macroblocks.size(), b.container.macroblocks.size());
  ASSERT_EQ(a.records.size(), b.records.size());
  for (std::size_t i = 0; i < a.records.size(); ++i) {
    EXPECT_EQ(a.records[i].name, b.records[i].name);
    EXPECT_EQ(a.records[i].shape, b.records[i].shape);
    EXPECT_EQ(a.records[i].dtype, b.records[i].dtype);
    EXPECT_EQ(a.records[i].offset_bytes, b.records[i].offset_bytes);
    EXPECT_EQ(a.records[i].size_bytes, b.records[i].size_bytes);
  }
}

TEST(Layout, OfAnyTensorsIsReadBackAsItWasMade) {
  constexpr std::uint64_t kAligns[] = {0, 1, 2, 3, 16, 24, 100, 128, 4096};
  for (std::uint32_t seed = 0; seed < 2000; ++seed) {
    SCOPED_TRACE(seed);
    RandomTensors random(seed);
    const std::vector<TensorSpec> tensors = random.list();
    const std::uint64_t align_bytes = kAligns[random.below(std::size(kAligns))];
    const Metadata layout = make_layout(tensors, align_bytes);
    const std::string footer = encode_footer(layout);
    expect_equal(layout, parse_footer(std::string_view(footer).substr(0, footer.size() - 16), layout.payload_bytes));
    for (const TensorRecord& record : layout.records) {
      EXPECT_EQ(record.offset_bytes % std::max<std::uint64_t>(align_bytes, 1), 0U);
      EXPECT_EQ(record.offset_bytes % element_bytes(record.dtype), 0U);
    }
  }
}

TEST(CheckedFooter, IsRefusedWhereItWouldBeTooLongToBeReadAndIsCountedToTheByte) {
  Metadata metadata = make_layout(kTensors, 0);
  metadata.user_metadata = {{"a", "b"}, {"c", "d"}};
  EXPECT_NO_THROW(check_footer(metadata, true));
  // So much that the checksums alone are over the limit.
  const std::uint64_t stripes = kMaxFooterBytes / 8 + 1;
  metadata.payload_bytes = stripes * Checksums::kStripeBytes - 1;
  metadata.checksums.emplace();
  const std::uint64_t rest_bytes = encode_footer(metadata).size() - 16;
  EXPECT_NO_THROW(check_footer(metadata, false));
  const std::string error = error_of([&] { check_footer(metadata, true); });
  EXPECT_TRUE(contains(error, "footer of " + std::to_string(rest_bytes + 8 * stripes) + " bytes is over the limit"))
      << error;
}

TEST(CheckedFooter, IsRefusedByItsEncoderToo) {
  Metadata metadata = make_layout(kTensors, 0);
  metadata.user_metadata["a"] = std::string(kMaxFooterBytes / 6, '\0');  // Six characters each.
  EXPECT_TRUE(contains(error_of([&] { encode_footer(metadata); }), "over the limit of 268435456"));
  EXPECT_TRUE(contains(error_of([&] { check_footer(metadata, false); }), "over the limit of 268435456"));
}

TEST(CheckedFooter, OfUserMetadataThatIsNotUtf8IsRefused) {
  for (const auto& [key, value] : {std::pair("\xff", "b"), std::pair("a", "\xc3")}) {
    Metadata metadata = make_layout(kTensors, 0);
    metadata.user_metadata[key] = value;
    EXPECT_TRUE(contains(error_of([&] { check_footer(metadata, false); }), "is not UTF-8"));
    EXPECT_TRUE(contains(error_of([&] { encode_footer(metadata); }), "is not UTF-8"));
  }
}

}  // namespace
}  // namespace flashpack
