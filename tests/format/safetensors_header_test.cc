#include <gtest/gtest.h>

#include <string>
#include <string_view>

#include "tests/format/change.h"
#include "torch_binding/format/format_rules.h"
#include "torch_binding/format/safetensors_header.h"

namespace flashpack {
namespace {

using test::Change;
using test::test_name;

constexpr std::uint64_t kPayloadBytes = 24;

constexpr std::string_view kHeader = R"({"__metadata__":{"format":"pt"},)"
                                     R"("w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},)"
                                     R"("b":{"dtype":"BF16","shape":[4],"data_offsets":[16,24]}})";

Metadata parse(std::string_view json, std::uint64_t payload_bytes = kPayloadBytes) {
  return parse_safetensors_header(json, 8 + json.size() + payload_bytes, "evil.safetensors");
}

std::string error_of(std::string_view json, std::uint64_t payload_bytes = kPayloadBytes) {
  try {
    parse(json, payload_bytes);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kBadFile);
    EXPECT_EQ(error.path(), "evil.safetensors");
    return error.what();
  }
  return "accepted";
}

/// A header of one tensor.
std::string one(const std::string& dtype, const std::string& shape, std::uint64_t size_bytes) {
  return R"({"x":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":[0,)" +
         std::to_string(size_bytes) + "]}}";
}

class SafetensorsRefused : public ::testing::TestWithParam<Change> {};

TEST_P(SafetensorsRefused, WithAClearError) {
  const std::string error = error_of(GetParam().text());
  EXPECT_TRUE(error.starts_with("read evil.safetensors")) << error;
  EXPECT_NE(error.find(GetParam().expected), std::string::npos) << error;
}

INSTANTIATE_TEST_SUITE_P(
    Json, SafetensorsRefused,
    ::testing::ValuesIn(std::vector<Change>{
        {"Empty", kHeader, "", "", "the safetensors header is not valid JSON"},
        {"RootIsArray", kHeader, "", "[]", "the safetensors header must be an object"},
        {"RootIsNull", kHeader, "", "null", "the safetensors header must be an object"},
        {"CutInTheMiddle", kHeader, "[16,24]}}", "[16,", "at 1"},
        {"BytesAfterTheEnd", kHeader, "[16,24]}}", "[16,24]}}x", "the safetensors header"},
        {"SecondDocument", kHeader, "[16,24]}}", "[16,24]}}{}", "the safetensors header"},
        {"ByteOrderMark", kHeader, "{", "\xef\xbb\xbf{", "the safetensors header is not valid JSON"},
        {"TrailingComma", kHeader, "[16,24]}}", "[16,24]},}", "the safetensors header is not valid JSON"},
        {"NaN", kHeader, "[2,2]", "[NaN]", "the safetensors header is not valid JSON"},
        {"TooDeep", kHeader, R"("shape":[4])", R"("shape":[4],"x":)" + std::string(100'000, '['), "too deep"},
        {"NameIsNotUtf8", kHeader, R"("w")", "\"\xff\"", "the safetensors header is not valid JSON"},
        {"NameIsLoneSurrogate", kHeader, R"("w")", R"("\ud800")", "the safetensors header is not valid JSON"},
        {"NameTwice", kHeader, R"("b")", R"("w")", R"(the safetensors header has the key "w" twice)"},
        {"NameTwiceWithEscapes", kHeader, R"("b")", R"("\u0077")", R"(has the key "w" twice)"},
        {"MetadataTwice", kHeader, "{", R"({"__metadata__":{},)", R"(has the key "__metadata__" twice)"},
        {"KeyTwiceInATensor", kHeader, R"("shape":[4])", R"("shape":[4],"shape":[4])",
         R"(tensor "b" has the key "shape" twice)"},
        {"KeyTwiceInWhatIsSkipped", kHeader, R"("shape":[4])", R"("shape":[4],"x":{"a":1,"a":2})",
         R"(tensor "b" has the key "a" twice)"},
    }),
    test_name);

INSTANTIATE_TEST_SUITE_P(
    Types, SafetensorsRefused,
    ::testing::ValuesIn(std::vector<Change>{
        {"TensorIsNumber", kHeader, R"({"dtype":"BF16","shape":[4],"data_offsets":[16,24]})", "3",
         R"(tensor "b" must be an object)"},
        {"TensorIsNull", kHeader, R"({"dtype":"BF16","shape":[4],"data_offsets":[16,24]})", "null",
         R"(tensor "b" must be an object)"},
        {"TensorIsArray", kHeader, R"({"dtype":"BF16","shape":[4],"data_offsets":[16,24]})", R"(["BF16",[4],[16,24]])",
         R"(tensor "b" must be an object)"},
        {"DTypeIsNumber", kHeader, R"("BF16")", "16", R"(tensor "b": dtype must be a string)"},
        {"ShapeIsNumber", kHeader, "[4]", "4", R"(tensor "b": shape must be an array)"},
        {"DimIsFloat", kHeader, "[4]", "[4.0]", R"(tensor "b": a dim of shape must be an integer)"},
        {"DimIsNegative", kHeader, "[4]", "[-4]", R"(tensor "b": a dim of shape must be >= 0, not -4)"},
        {"DimPastInt64", kHeader, "[4]", "[9223372036854775808]", "which is past 2^63"},
        {"OffsetsAreAnObject", kHeader, "[16,24]", R"({"begin":16})", R"(tensor "b": data_offsets must be an array)"},
        {"OffsetIsFloat", kHeader, "[16,24]", "[16,24.0]", R"(tensor "b": data_offsets must be an integer)"},
        {"OffsetIsNegative", kHeader, "[16,24]", "[-1,24]", R"(tensor "b": data_offsets must be >= 0, not -1)"},
        {"OffsetPastInt64", kHeader, "[16,24]", "[16,18446744073709551615]", "which is past 2^63"},
        {"MetadataIsString", kHeader, R"({"format":"pt"})", R"("pt")", "__metadata__ must be an object"},
        {"MetadataIsNumber", kHeader, R"("pt")", "1", R"(__metadata__: "format" must be a string)"},
        {"MetadataIsNested", kHeader, R"("pt")", R"({"a":"b"})", R"(__metadata__: "format" must be a string)"},
        {"MetadataIsNull", kHeader, R"("pt")", "null", R"(__metadata__: "format" must be a string)"},
        {"MetadataKeyTwice", kHeader, R"("pt")", R"("pt","format":"tf")", R"(__metadata__ has the key "format" twice)"},
    }),
    test_name);

const std::string k65Dims = [] {
  std::string dims = "[4";
  for (int i = 0; i < 64; ++i) dims += ",1";
  return dims + "]";
}();

INSTANTIATE_TEST_SUITE_P(
    Tensor, SafetensorsRefused,
    ::testing::ValuesIn(std::vector<Change>{
        {"NoDType", kHeader, R"("dtype":"BF16",)", "", R"(tensor "b" has no dtype)"},
        {"NoShape", kHeader, R"("shape":[4],)", "", R"(tensor "b" has no shape)"},
        {"NoOffsets", kHeader, R"(,"data_offsets":[16,24])", "", R"(tensor "b" has no data_offsets)"},
        {"OneOffset", kHeader, "[16,24]", "[16]", R"(tensor "b": data_offsets has 1 numbers, not 2)"},
        {"ThreeOffsets", kHeader, "[16,24]", "[16,24,24]", R"(tensor "b": data_offsets has 3 numbers, not 2)"},
        {"NameHasNul", kHeader, R"("b")", R"("b\u0000c")", R"(tensor "b\u0000c" has a NUL character in its name)"},
        {"UnknownDType", kHeader, "BF16", "BF17", R"(tensor "b" has the dtype "BF17", which is not known)"},
        {"DTypeInLowerCase", kHeader, "BF16", "bf16", R"(tensor "b" has the dtype "bf16", which is not known)"},
        {"DTypeIsEmpty", kHeader, "BF16", "", R"(tensor "b" has the dtype "", which is not known)"},
        {"F6E2M3", kHeader, "BF16", "F6_E2M3", R"(the dtype "F6_E2M3", which torch does not have)"},
        {"F6E3M2", kHeader, "BF16", "F6_E3M2", R"(the dtype "F6_E3M2", which torch does not have)"},
        {"F4WithOddLastDim", kHeader, R"("BF16","shape":[4])", R"("F4","shape":[2,3])", "its last dim is odd"},
        {"F4WithoutDims", kHeader, R"("BF16","shape":[4])", R"("F4","shape":[])", R"(tensor "b" has 4-bit floats)"},
        {"TooManyDims", kHeader, "[4]", k65Dims, R"(tensor "b": a dim of shape has more than 64 dims)"},
        {"ShapeOverflows", kHeader, "[4]", "[2,9223372036854775807]", R"(tensor "b" has a shape whose size passes)"},
        {"BytesOverflow", kHeader, R"("BF16","shape":[4])", R"("F64","shape":[9223372036854775807])", "passes 2^63"},
        {"BytesWrapToTheirSize", kHeader, R"("F32","shape":[2,2])", R"("F32","shape":[4,4611686018427387905])",
         "passes 2^63"},
        {"EmptyShapeWhoseStridesOverflow", kHeader, "[4]", "[4611686018427387904,0,4611686018427387904]",
         "passes 2^63"},
        {"SizeIsNotTheShape", kHeader, "[4]", "[5]", R"(tensor "b" has 8 bytes, but its dtype and shape take 10)"},
        {"SizeIsNotTheDType", kHeader, "BF16", "F32", R"(tensor "b" has 8 bytes, but its dtype and shape take 16)"},
    }),
    test_name);

INSTANTIATE_TEST_SUITE_P(
    Places, SafetensorsRefused,
    ::testing::ValuesIn(std::vector<Change>{
        {"EndBeforeTheirBegin", kHeader, "[16,24]", "[24,16]",
         R"(tensor "b" has data_offsets that end before they begin)"},
        {"PastTheEnd", kHeader, "[16,24]", "[17,25]", "but the file has only 24 of them: it was cut"},
        {"HugeRange", kHeader, "[16,24]", "[9223372036854775799,9223372036854775807]", "the file has only 24 of them"},
        {"SameRange", kHeader, R"("BF16","shape":[4],"data_offsets":[16,24])",
         R"("F32","shape":[2,2],"data_offsets":[0,16])", R"(tensor "b" overlaps tensor "w")"},
        {"OverlapInPart", kHeader, "[16,24]", "[15,23]", R"(tensor "b" overlaps tensor "w")"},
        {"EmptyInsideAnother", kHeader, R"([4],"data_offsets":[16,24])", R"([0],"data_offsets":[8,8])",
         R"(tensor "b" overlaps tensor "w")"},
        {"HoleAtTheBeginning", kHeader, R"("F32","shape":[2,2],"data_offsets":[0,16])",
         R"("F32","shape":[2],"data_offsets":[8,16])", R"(8 bytes before tensor "w" belong to no tensor)"},
        {"HoleInTheMiddle", kHeader, R"("BF16","shape":[4],"data_offsets":[16,24])",
         R"("BF16","shape":[3],"data_offsets":[18,24])", R"(2 bytes before tensor "b" belong to no tensor)"},
        {"HoleAtTheEnd", kHeader, R"([4],"data_offsets":[16,24])", R"([3],"data_offsets":[16,22])",
         "2 bytes at the end of the file belong to no tensor"},
        {"NoTensors", kHeader, "", "{}", "24 bytes at the end of the file belong to no tensor"},
    }),
    test_name);

TEST(SafetensorsHeader, BecomesTheSameRecordsAsAFooter) {
  const Metadata metadata = parse(kHeader);
  EXPECT_EQ(metadata.format, FileFormat::kSafetensors);
  EXPECT_EQ(metadata.payload_bytes, 8 + kHeader.size() + kPayloadBytes);
  EXPECT_EQ(metadata.user_metadata, (std::map<std::string, std::string>{{"format", "pt"}}));
  EXPECT_TRUE(metadata.container.macroblocks.empty());
  EXPECT_FALSE(metadata.checksums);
  ASSERT_EQ(metadata.records.size(), 2U);
  const TensorRecord& record = metadata.records[1];
  EXPECT_EQ(record.name, "b");
  EXPECT_EQ(record.dtype, DType::kBFloat16);
  EXPECT_EQ(record.shape, std::vector<std::int64_t>{4});
  EXPECT_EQ(record.offset_bytes, 8 + kHeader.size() + 16);
  EXPECT_EQ(record.size_bytes, 8U);
}

TEST(SafetensorsHeader, RecordsAreInFileOrderAndEmptyOnesInTheHeadersOrder) {
  const auto empty = [](const std::string& name, const std::string& at) {
    return '"' + name + R"(":{"dtype":"I64","shape":[0,3],"data_offsets":[)" + at + ',' + at + "]}";
  };
  const Metadata metadata =
      parse("{" + empty("e2", "4") + R"(,"late":{"dtype":"U8","shape":[4],"data_offsets":[4,8]},)" + empty("end", "8") +
                ',' + empty("e1", "4") + "," + R"("early":{"dtype":"I32","shape":[],"data_offsets":[0,4]}})",
            8);
  std::vector<std::string> names;
  for (const TensorRecord& record : metadata.records) names.push_back(record.name);
  EXPECT_EQ(names, (std::vector<std::string>{"early", "e2", "e1", "late", "end"}));
  EXPECT_TRUE(metadata.records[0].shape.empty());
}

TEST(SafetensorsHeader, EveryDTypeOfTorchIsRead) {
  const std::vector<std::pair<const char*, DType>> dtypes = {{"BOOL", DType::kBool},
                                                             {"U8", DType::kUInt8},
                                                             {"I8", DType::kInt8},
                                                             {"I16", DType::kInt16},
                                                             {"U16", DType::kUInt16},
                                                             {"I32", DType::kInt32},
                                                             {"U32", DType::kUInt32},
                                                             {"I64", DType::kInt64},
                                                             {"U64", DType::kUInt64},
                                                             {"F16", DType::kFloat16},
                                                             {"BF16", DType::kBFloat16},
                                                             {"F32", DType::kFloat32},
                                                             {"F64", DType::kFloat64},
                                                             {"C64", DType::kComplex64},
                                                             {"F8_E4M3", DType::kFloat8E4M3FN},
                                                             {"F8_E4M3FNUZ", DType::kFloat8E4M3FNUZ},
                                                             {"F8_E5M2", DType::kFloat8E5M2},
                                                             {"F8_E5M2FNUZ", DType::kFloat8E5M2FNUZ},
                                                             {"F8_E8M0", DType::kFloat8E8M0FNU}};
  for (const auto& [name, dtype] : dtypes) {
    const std::uint64_t size_bytes = 3 * element_bytes(dtype);
    EXPECT_EQ(parse(one(name, "[3]", size_bytes), size_bytes).records.at(0).dtype, dtype) << name;
  }
}

TEST(SafetensorsHeader, FourBitFloatsBecomePairs) {
  const TensorRecord record = parse(one("F4", "[3,4]", 6), 6).records.at(0);
  EXPECT_EQ(record.dtype, DType::kFloat4E2M1FNX2);
  EXPECT_EQ(record.shape, (std::vector<std::int64_t>{3, 2}));
  EXPECT_EQ(record.size_bytes, 6U);
}

TEST(SafetensorsHeader, WhiteSpaceAroundTheJsonIsPadding) {
  EXPECT_EQ(parse("\t\n " + std::string(kHeader) + " \r\n\t ").records.size(), 2U);
}

TEST(SafetensorsHeader, UnknownKeysOfATensorAreSkipped) {
  std::string json(kHeader);
  json.insert(json.find(R"("shape":[4])"), R"("strides":[1,[2.5,{"a":null}]],)");
  EXPECT_EQ(parse(json).records.size(), 2U);
}

TEST(SafetensorsHeader, MetadataMayBeNullOrMissing) {
  EXPECT_TRUE(parse(R"({"__metadata__":null})", 0).user_metadata.empty());
  EXPECT_TRUE(parse("{}", 0).records.empty());
}

TEST(SafetensorsHeader, EmptyTensorsOfAnyShapeAreRead) {
  EXPECT_EQ(parse(one("F32", "[2,0]", 0), 0).records.at(0).shape, (std::vector<std::int64_t>{2, 0}));
  EXPECT_EQ(parse(one("F4", "[0]", 0), 0).records.at(0).size_bytes, 0U);
}

TEST(SafetensorsHeader, HeaderThatIsLongerThanTheFileIsRefused) {
  EXPECT_THROW(parse_safetensors_header("{}", 9), Error);
  EXPECT_THROW(parse_safetensors_header("{}", 0), Error);
  EXPECT_NO_THROW(parse_safetensors_header("{}", 10));
}

TEST(SafetensorsHeader, ErrorsSayWhereInTheFileTheyAre) {
  const auto offset_of = [](const std::string& json) {
    try {
      parse(json);
    } catch (const Error& error) {
      return error.offset_bytes();
    }
    return std::uint64_t{0};
  };
  EXPECT_EQ(offset_of(R"({"w":!})"), 8U + 5);
  std::string json(kHeader);
  json.replace(json.find("[16,24]"), 7, "[15,23]");
  EXPECT_EQ(offset_of(json), 8 + json.size() + 15);
}

TEST(SafetensorsHeader, CannotBeWrittenAsAFooter) {
  const Metadata metadata = parse(kHeader);
  EXPECT_THROW(encode_footer(metadata), Error);
  EXPECT_THROW(check_footer(metadata, true), Error);
}

#define EXPECT_SAYS(text, ...) EXPECT_NE(error_of_writing({TensorSpec __VA_ARGS__}).find(text), std::string::npos)

std::string error_of_writing(const std::vector<TensorSpec>& tensors) {
  try {
    make_safetensors_header(tensors, {});
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kInvalidArgument);
    return error.what();
  }
  return "written";
}

TEST(SafetensorsHeader, ThatIsWrittenIsReadAsItWasMeantWithLargeElementsFirst) {
  const std::vector<TensorSpec> tensors = {{"b \"\n\xc3\xa9", DType::kUInt8, {3}},
                                           {"a", DType::kUInt8, {}},
                                           {"pairs", DType::kFloat4E2M1FNX2, {2, 5}},
                                           {"empty", DType::kFloat32, {0, 7}},
                                           {"large", DType::kComplex64, {2, 1}}};
  const std::map<std::string, std::string> text = {
      {"format", "pt"}, {"\\", "\t"}, {std::string("a\0", 2), std::string("\0b", 2)}};
  const SafetensorsHeader header = make_safetensors_header(tensors, text);
  EXPECT_EQ(header.order, (std::vector<std::size_t>{4, 3, 1, 0, 2}));
  EXPECT_EQ(header.bytes.size() % 8, 0U);
  EXPECT_EQ(rules::length_at(header.bytes, 0), header.bytes.size() - 8);
  EXPECT_NE(header.bytes.find(R"("shape":[2,10])"), std::string::npos) << "a header counts 4-bit floats one by one";

  const Metadata metadata = parse_safetensors_header(header.bytes.substr(8), header.bytes.size() + 16 + 14);
  EXPECT_EQ(metadata.user_metadata, text);
  ASSERT_EQ(metadata.records.size(), tensors.size());
  std::uint64_t at = header.bytes.size();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorRecord& record = metadata.records[i];
    const auto& [name, dtype, shape] = tensors[header.order[i]];
    EXPECT_EQ(record.name, name);
    EXPECT_EQ(record.dtype, dtype);
    EXPECT_EQ(record.shape, shape);
    EXPECT_EQ(record.offset_bytes, at);
    at += record.size_bytes;
  }
}

TEST(SafetensorsHeader, IsNotMadeForWhatNoReaderTakes) {
  EXPECT_SAYS("a tensor of complex128 called \"a\"", {"a", DType::kComplex128, {1}});
  EXPECT_SAYS("stands for something else", {"__metadata__", DType::kUInt8, {1}});
  EXPECT_SAYS("has a NUL character", {std::string("a\0b", 3), DType::kUInt8, {1}});
  EXPECT_SAYS("4-bit floats without a dim", {"a", DType::kFloat4E2M1FNX2, {}});
  EXPECT_SAYS("passes 2^63", {"a", DType::kUInt8, {1L << 40, 1L << 40}});
  EXPECT_SAYS("passes 2^63", {"a", DType::kFloat4E2M1FNX2, {0, 1L << 62}});
  EXPECT_SAYS("passes 2^63", {"a", DType::kInt64, {(1L << 61) + 1}});
  const std::vector<TensorSpec> twice = {
      {"a", DType::kUInt8, {1}}, {"b", DType::kUInt8, {1}}, {"a", DType::kInt64, {}}};
  EXPECT_NE(error_of_writing(twice).find("two tensors called \"a\""), std::string::npos);
}

TEST(SafetensorsHeader, HasANameForEveryDTypeThatFilesCanHave) {
  for (int i = 0; i <= static_cast<int>(DType::kFloat4E2M1FNX2); ++i) {
    const auto dtype = static_cast<DType>(i);
    const bool cannot = dtype == DType::kComplex32 || dtype == DType::kComplex128;
    EXPECT_EQ(safetensors_dtype(dtype).empty(), cannot) << dtype_name(dtype);
  }
  EXPECT_EQ(safetensors_dtype(DType::kBFloat16), "BF16");
}

}  // namespace
}  // namespace flashpack
