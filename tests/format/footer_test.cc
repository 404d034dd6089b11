#include <gtest/gtest.h>

#include <string>
#include <string_view>

#include "flashpack/format.h"
#include "tests/format/change.h"

namespace flashpack {
namespace {

using test::Change;
using test::test_name;

constexpr std::uint64_t kPayloadBytes = 40;

constexpr std::string_view kV3 =
    R"({"format":"flashpack_v3","target_dtype":"float32","align_bytes":16,"total_elems":10,"index":[)"
    R"({"name":"w","shape":[2,2],"offset":0,"length":4},{"name":"b","shape":[2],"offset":8,"length":2}]})";

constexpr std::string_view kV4 =
    R"({"format":"flashpack_v4","align_bytes":16,"total_payload_bytes":40,"total_elems":7,"macroblocks":[)"
    R"({"dtype":"float32","offset_bytes":0,"length_bytes":16,"length_elems":4},)"
    R"({"dtype":"int64","offset_bytes":16,"length_bytes":24,"length_elems":3}],"index":[)"
    R"({"name":"w","shape":[2,2],"offset":0,"length":4,"macroblock":0},)"
    R"({"name":"ids","shape":[3],"offset":0,"length":3,"macroblock":1}]})";

std::string error_of(std::string_view json, std::uint64_t payload_bytes = kPayloadBytes) {
  try {
    parse_footer(json, payload_bytes, "evil.flashpack");
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kBadFile);
    EXPECT_EQ(error.path(), "evil.flashpack");
    return error.what();
  }
  return "accepted";
}

class Refused : public ::testing::TestWithParam<Change> {};

TEST_P(Refused, WithAClearError) {
  const std::string error = error_of(GetParam().text());
  EXPECT_TRUE(error.starts_with("read evil.flashpack")) << error;
  EXPECT_NE(error.find(GetParam().expected), std::string::npos) << error;
}

const std::string kDeep = R"("x":)" + std::string(100'000, '[') + R"(,"align_bytes")";

INSTANTIATE_TEST_SUITE_P(
    Json, Refused,
    ::testing::ValuesIn(std::vector<Change>{
        {"Empty", kV3, "", "", "the footer is not valid JSON"},
        {"OnlySpace", kV3, "", "  ", "the footer is not valid JSON"},
        {"RootIsArray", kV3, "", "[]", "the footer must be an object"},
        {"RootIsNumber", kV3, "", "3", "the footer must be an object"},
        {"RootIsHugeNumber", kV3, "", "18446744073709551615", "the footer must be an object"},
        {"RootIsString", kV3, "", "\"x\"", "the footer must be an object"},
        {"RootIsNull", kV3, "", "null", "the footer must be an object"},
        {"CutInTheMiddle", kV3, R"("total_elems":10)", "", "at 1"},
        {"BytesAfterTheEnd", kV3, "}]}", "}]}x", "the footer"},
        {"SecondDocument", kV3, "}]}", "}]}{}", "the footer"},
        {"ByteOrderMark", kV3, "{", "\xef\xbb\xbf{", "the footer is not valid JSON"},
        {"TrailingComma", kV3, "}]}", "}],}", "the footer is not valid JSON"},
        {"Comment", kV3, "{", "{/**/", "the footer is not valid JSON"},
        {"NaN", kV3, R"("align_bytes":16)", R"("align_bytes":NaN)", "the footer is not valid JSON"},
        {"Infinity", kV3, R"("align_bytes":16)", R"("align_bytes":Infinity)", "the footer is not valid JSON"},
        {"TooDeep", kV3, R"("align_bytes")", kDeep, "the footer is not valid JSON: too deep"},
        {"NineDeep", kV3, "{", R"({"x":[[[[[[[[]]]]]]]],)", "the footer is not valid JSON: too deep"},
        {"NameIsNotUtf8", kV3, R"("w")", "\"\xff\"", "the footer is not valid JSON"},
        {"NameIsOverlongUtf8", kV3, R"("w")", "\"\xc0\x80\"", "the footer is not valid JSON"},
        {"NameIsUtf8Surrogate", kV3, R"("w")", "\"\xed\xa0\x80\"", "the footer is not valid JSON"},
        {"NameIsLoneSurrogate", kV3, R"("w")", R"("\ud800")", "the footer is not valid JSON"},
        {"NameHasRawControlCharacter", kV3, R"("w")", "\"\n\"", "the footer is not valid JSON"},
        {"DuplicateKeyInFooter", kV3, "{", R"({"format":"flashpack_v4",)", R"(the footer has the key "format" twice)"},
        {"DuplicateKeyInRecord", kV3, R"("length":4)", R"("length":4,"offset":8)",
         R"(record 0 "w" has the key "offset" twice)"},
        {"DuplicateKeyInMacroblock", kV4, R"("length_elems":3)", R"("length_elems":3,"dtype":"int8")",
         R"(macroblock 1 has the key "dtype" twice)"},
        {"DuplicateKeyWrittenWithEscapes", kV3, R"("length":4)", R"("length":4,"off\u0073et":8)",
         R"(record 0 "w" has the key "offset" twice)"},
        {"DuplicateUnknownKey", kV3, "{", R"({"crc":1,"crc":2,)", R"(the footer has the key "crc" twice)"},
        {"DuplicateKeyInIgnoredObject", kV3, "{", R"({"meta":{"a":1,"a":2},)", R"(has the key "a" twice)"},
    }),
    test_name);

INSTANTIATE_TEST_SUITE_P(
    Types, Refused,
    ::testing::ValuesIn(std::vector<Change>{
        {"OffsetIsFloat", kV3, R"("offset":8)", R"("offset":8.0)", R"(record 1 "b": offset must be an integer)"},
        {"OffsetIsExponent", kV3, R"("offset":8)", R"("offset":8e0)", R"(record 1 "b": offset must be an integer)"},
        {"OffsetIsHugeExponent", kV3, R"("offset":8)", R"("offset":1e999)", "record 1 \"b\": offset"},
        {"OffsetIsString", kV3, R"("offset":8)", R"("offset":"8")", R"(record 1 "b": offset must be an integer)"},
        {"OffsetIsBool", kV3, R"("offset":8)", R"("offset":true)", R"(record 1 "b": offset must be an integer)"},
        {"OffsetIsNull", kV3, R"("offset":8)", R"("offset":null)", R"(record 1 "b": offset must be an integer)"},
        {"OffsetIsArray", kV3, R"("offset":8)", R"("offset":[8])", R"(record 1 "b": offset must be an integer)"},
        {"OffsetIsPastInt64", kV3, R"("offset":8)", R"("offset":9223372036854775808)", "past 2^63"},
        {"OffsetIsPastUInt64", kV3, R"("offset":8)", R"("offset":18446744073709551616)", "offset must be an integer"},
        {"OffsetHas5000Digits", kV3, R"("offset":8)", R"("offset":)" + std::string(5000, '9'), "offset"},
        {"NameIsNull", kV3, R"("w")", "null", "record 0: name must be a string"},
        {"NameIsNumber", kV3, R"("w")", "7", "record 0: name must be a string"},
        {"NameIsHugeNumber", kV3, R"("w")", "18446744073709551615", "record 0: name must be a string"},
        {"NameIsFloat", kV3, R"("w")", "0.5", "record 0: name must be a string"},
        {"NameIsArray", kV3, R"("w")", "[]", "record 0: name must be a string"},
        {"NameIsObject", kV3, R"("w")", "{}", "record 0: name must be a string"},
        {"ShapeIsNumber", kV3, "[2,2]", "4", R"(record 0 "w": shape must be an array)"},
        {"ShapeHasFloat", kV3, "[2,2]", "[2,2.0]", R"(record 0 "w": a dim of shape must be an integer)"},
        {"ShapeHasString", kV3, "[2,2]", R"(["4"])", R"(record 0 "w": a dim of shape must be an integer)"},
        {"ShapeIsNested", kV3, "[2,2]", "[[2,2]]", R"(record 0 "w": a dim of shape must be an integer)"},
        {"IndexIsObject", kV3, R"("index":[)", R"("index":{"a":1},"x":[)", "the footer: index must be an array"},
        {"IndexHasString", kV3, R"("index":[)", R"("index":["w",)", "record 0 must be an object"},
        {"IndexHasHugeNumber", kV3, R"("index":[)", R"("index":[18446744073709551615,)", "record 0 must be an object"},
        {"IndexHasNull", kV3, R"("index":[)", R"("index":[null,)", "record 0 must be an object"},
        {"IndexHasArray", kV3, R"("index":[)", R"("index":[[],)", "record 0 must be an object"},
        {"ShapeHasNull", kV3, "[2,2]", "[null]", R"(record 0 "w": a dim of shape must be an integer)"},
        {"ShapeHasHugeNumber", kV3, "[2,2]", "[18446744073709551615]", "which is past 2^63"},
        {"FormatIsNumber", kV3, R"("flashpack_v3")", "3", "the footer: format must be a string"},
        {"MacroblocksIsObject", kV4, R"("macroblocks":[)", R"("macroblocks":{},"x":[)",
         "the footer: macroblocks must be an array"},
        {"MacroblockIsNumber", kV4, R"("macroblocks":[)", R"("macroblocks":[3,)", "macroblock 0 must be an object"},
        {"DTypeIsNumber", kV4, R"("dtype":"int64")", R"("dtype":7)", "macroblock 1: dtype must be a string"},
    }),
    test_name);

INSTANTIATE_TEST_SUITE_P(
    Footer, Refused,
    ::testing::ValuesIn(std::vector<Change>{
        {"UnknownFormat", kV3, "flashpack_v3", "flashpack_v9", R"(Unexpected format: "flashpack_v9")"},
        {"NoFormat", kV3, R"("format":"flashpack_v3",)", "", "Unexpected format: none is given"},
        {"NoTargetDType", kV3, R"("target_dtype":"float32",)", "", "the footer has no target_dtype"},
        {"NoAlignBytes", kV3, R"("align_bytes":16,)", "", "the footer has no align_bytes"},
        {"NoTotalElems", kV3, R"("total_elems":10,)", "", "the footer has no total_elems"},
        {"NoIndex", kV3, R"("index")", R"("indices")", "the footer has no index"},
        {"NoMacroblocks", kV4, R"("macroblocks")", R"("blocks")", "Missing macroblock metadata for flashpack v4 file."},
        {"UnknownTargetDType", kV3, "float32", "float4", R"(Unsupported dtype string in metadata: "float4")"},
        {"NegativeAlignBytes", kV3, R"("align_bytes":16)", R"("align_bytes":-16)", "align_bytes must be >= 0, not -16"},
        {"NegativeTotalElems", kV3, R"("total_elems":10)", R"("total_elems":-10)", "total_elems must be >= 0"},
        {"TotalElemsPastThePayload", kV3, R"("total_elems":10)", R"("total_elems":11)",
         "macroblock 0 at 0+44 runs past the payload of 40 bytes"},
        {"TotalElemsWhoseBytesOverflow", kV3, R"("total_elems":10)", R"("total_elems":4611686018427387906)",
         "pass 2^64 bytes"},
        {"V3WithMacroblocks", kV3, R"("index")", R"("macroblocks":[],"index")", "lists macroblocks"},
    }),
    test_name);

INSTANTIATE_TEST_SUITE_P(
    Macroblock, Refused,
    ::testing::ValuesIn(std::vector<Change>{
        {"CompressedByFpz", kV4, R"("length_elems":3)", R"("length_elems":3,"fpz":{"codec":"zstd-splitplane-v1"})",
         R"(macroblock 1 has the key "fpz", which this version does not know)"},
        {"EncodedByUnknownKey", kV4, R"("length_elems":3)", R"("length_elems":3,"codec":null)",
         R"(macroblock 1 has the key "codec", which this version does not know)"},
        {"UnknownDType", kV4, "int64", "int128", R"(macroblock 1: Unsupported dtype string in metadata: "int128")"},
        {"NoDType", kV4, R"("dtype":"int64",)", "", "macroblock 1 has no dtype"},
        {"NoLengthElems", kV4, R"(,"length_elems":3)", "", "macroblock 1 has no length_elems"},
        {"NegativeOffset", kV4, R"("offset_bytes":16)", R"("offset_bytes":-16)",
         "macroblock 1: offset_bytes must be >= 0, not -16"},
        {"NegativeLength", kV4, R"("length_bytes":24)", R"("length_bytes":-24)",
         "macroblock 1: length_bytes must be >= 0, not -24"},
        {"Misaligned", kV4, R"("offset_bytes":16)", R"("offset_bytes":12)", "macroblock 1 is misaligned"},
        {"LengthsDisagree", kV4, R"("length_bytes":24)", R"("length_bytes":16)",
         "macroblock 1: length_bytes 16 is not 3 elements of int64"},
        {"LengthOverflows", kV4, R"("length_bytes":24,"length_elems":3)",
         R"("length_bytes":24,"length_elems":2305843009213693955)", "macroblock 1: length_bytes 24 is not"},
        {"RunsIntoTheFooter", kV4, R"("offset_bytes":16)", R"("offset_bytes":24)",
         "macroblock 1 at 24+24 runs past the payload of 40 bytes"},
        {"EndOverflows", kV4, R"("offset_bytes":16)", R"("offset_bytes":9223372036854775800)",
         "macroblock 1 at 9223372036854775800+24 runs past the payload"},
        {"EmptyPastThePayload", kV4, R"("offset_bytes":16,"length_bytes":24,"length_elems":3)",
         R"("offset_bytes":48,"length_bytes":0,"length_elems":0)", "macroblock 1 at 48+0 runs past the payload"},
        {"Overlaps", kV4, R"("offset_bytes":16)", R"("offset_bytes":8)", "macroblock 1 overlaps macroblock 0"},
        {"SameRangeAsAnother", kV4, R"("offset_bytes":16,"length_bytes":24,"length_elems":3)",
         R"("offset_bytes":0,"length_bytes":16,"length_elems":2)", "overlaps macroblock"},
        {"ListIsEmpty", kV4, R"("macroblocks":[)", R"("macroblocks":[],"x":[)",
         "Missing macroblock metadata for flashpack v4 file."},
    }),
    test_name);

const std::string k65Dims = "[1" + [] {
  std::string dims;
  for (int i = 0; i < 64; ++i) dims += ",1";
  return dims;
}() + "]";

INSTANTIATE_TEST_SUITE_P(
    Record, Refused,
    ::testing::ValuesIn(std::vector<Change>{
        {"NoName", kV3, R"("name":"w",)", "", "record 0 has no name"},
        {"NoShape", kV3, R"("shape":[2,2],)", "", R"(record 0 "w" has no shape)"},
        {"NoOffset", kV3, R"("offset":8,)", "", R"(record 1 "b" has no offset)"},
        {"NoLength", kV3, R"(,"length":2)", "", R"(record 1 "b" has no length)"},
        {"DuplicateName", kV3, R"("name":"b")", R"("name":"w")", R"(record 1 "w" has the name of record 0)"},
        {"DuplicateNameWrittenWithEscapes", kV3, R"("name":"b")", R"("name":"\u0077")",
         R"(record 1 "w" has the name of record 0)"},
        {"MacroblockDoesNotExist", kV4, R"("macroblock":1)", R"("macroblock":2)",
         R"(record 1 "ids": Index entry references macroblock 2, but only 2 blocks exist.)"},
        {"MacroblockIsNegative", kV4, R"("macroblock":1)", R"("macroblock":-1)",
         R"(record 1 "ids": macroblock must be >= 0, not -1)"},
        {"MacroblockWrapsIn32Bits", kV4, R"("macroblock":1)", R"("macroblock":4294967296)",
         R"(record 1 "ids" references macroblock 4294967296)"},
        {"MacroblockOtherThan0InV3", kV3, R"("length":2)", R"("length":2,"macroblock":1)",
         R"(record 1 "b": Index entry references macroblock 1, but only 1 blocks exist.)"},
        {"NegativeOffset", kV3, R"("offset":8)", R"("offset":-8)", R"(record 1 "b": offset must be >= 0, not -8)"},
        {"NegativeLength", kV3, R"("length":2)", R"("length":-2)", R"(record 1 "b": length must be >= 0, not -2)"},
        {"NegativeDim", kV3, "[2]", "[-1]", R"(record 1 "b": a dim of shape must be >= 0, not -1)"},
        {"TooManyDims", kV3, "[2]", k65Dims, R"(record 1 "b": a dim of shape has more than 64 dims)"},
        {"LengthIsNotTheShape", kV3, "[2,2]", "[2,3]",
         R"(Could not get tensor for record 0 "w": its shape has 6 elements, its length is 4)"},
        {"ZeroDimOfLength0", kV3, R"([2],"offset":8,"length":2)", R"([],"offset":8,"length":0)",
         "its shape has 1 elements, its length is 0"},
        {"ShapeOverflows", kV3, "[2,2]", "[4294967296,4294967296]", R"(record 0 "w": the size of its shape passes)"},
        {"ShapeWrapsToItsLength", kV3, "[2,2]", "[20,922337203685477581]", "the size of its shape passes 2^63"},
        {"EmptyShapeWhoseStridesOverflow", kV3, R"([2],"offset":8,"length":2)",
         R"([4611686018427387904,0,4611686018427387904],"offset":8,"length":0)", "the size of its shape passes 2^63"},
        {"RunsPastItsMacroblock", kV4, R"([3],"offset":0,"length":3)", R"([3],"offset":2,"length":3)",
         R"(Could not get tensor for record 1 "ids": elements 2+3 run past its macroblock of 3)"},
        {"EndOverflows", kV3, R"("offset":8)", R"("offset":9223372036854775807)", "run past its macroblock of 10"},
        {"EmptyPastItsMacroblock", kV3, R"([2],"offset":8,"length":2)", R"([0],"offset":12,"length":0)",
         "run past its macroblock of 10"},
        {"Misaligned", kV3, R"("offset":8)", R"("offset":7)",
         R"(record 1 "b" is misaligned: offset 7 is not a multiple of 4 elements (align_bytes 16))"},
        {"OverlapsInPart", kV3, R"([2],"offset":8,"length":2)", R"([2],"offset":0,"length":2)", "overlaps record"},
        {"OverlapsInsideALongerOne", kV3, R"("shape":[2,2],"offset":0,"length":4)",
         R"("shape":[9],"offset":0,"length":9)", R"(record 1 "b" overlaps record 0 "w")"},
    }),
    test_name);

INSTANTIATE_TEST_SUITE_P(
    Checksums, Refused,
    ::testing::ValuesIn(std::vector<Change>{
        {"TooFew", kV3, "{", R"({"crc32c_per_mib":"",)", "crc32c_per_mib has 0 digits"},
        {"TooMany", kV3, "{", R"({"crc32c_per_mib":"0123456789abcdef",)", "crc32c_per_mib has 16 digits"},
        {"NotHexadecimal", kV3, "{", R"({"crc32c_per_mib":"0x345678",)", "crc32c_per_mib is not hexadecimal"},
        {"NotAString", kV3, "{", R"({"crc32c_per_mib":["01234567"],)", "crc32c_per_mib must be a string"},
        {"OfTheFooterNotLast", kV3, "{", R"({"footer_crc32c":"01234567",)", "footer_crc32c is not the last key"},
    }),
    test_name);

INSTANTIATE_TEST_SUITE_P(
    UserMetadata, Refused,
    ::testing::ValuesIn(std::vector<Change>{
        {"IsAString", kV3, "{", R"({"metadata":"pt",)", "the footer: metadata must be an object"},
        {"IsNull", kV3, "{", R"({"metadata":null,)", "the footer: metadata must be an object"},
        {"Twice", kV3, "{", R"({"metadata":{},"metadata":{},)", R"(the key "metadata" twice)"},
        {"ValueIsANumber", kV3, "{", R"({"metadata":{"a":"b","rank":16},)", R"(metadata "rank" must be a string)"},
        {"ValueIsNull", kV3, "{", R"({"metadata":{"rank":null},)", R"(metadata "rank" must be a string)"},
        {"ValueIsTrue", kV3, "{", R"({"metadata":{"rank":true},)", R"(metadata "rank" must be a string)"},
        {"ValueIsAnObject", kV3, "{", R"({"metadata":{"rank":{}},)", R"(metadata "rank" must be a string)"},
        {"ValueIsAnArray", kV3, "{", R"({"metadata":{"rank":["16"]},)", R"(metadata "rank" must be a string)"},
        {"KeyTwice", kV3, "{", R"({"metadata":{"a":"b","\u0061":"c"},)", R"(the metadata "a" twice)"},
        {"NotUtf8", kV3, "{", "{\"metadata\":{\"a\":\"\xff\"},", "the footer is not valid JSON"},
        {"HalfASurrogate", kV3, "{", R"({"metadata":{"a":"\ud800"},)", "the footer is not valid JSON"},
    }),
    test_name);

TEST(FooterUserMetadata, IsReadAsItWasWrittenAndTheRestOfTheFooterStaysAsItIs) {
  for (const std::string_view json : {kV3, kV4}) {
    Metadata metadata = parse_footer(json, kPayloadBytes);
    EXPECT_TRUE(metadata.user_metadata.empty());
    const std::string plain = encode_footer(metadata);
    metadata.user_metadata = {{"title", "\"\xc3\xa9\"\n"}, {"format", "pt"}, {"", ""}, {"name", std::string(1, '\0')}};
    metadata.checksums = {.size_bytes = kPayloadBytes, .crc32c = {0x0badcafe}};
    const std::string footer = encode_footer(metadata);
    EXPECT_TRUE(footer.starts_with(
        plain.substr(0, plain.size() - 17) +
        ",\"metadata\":{\"\":\"\",\"format\":\"pt\",\"name\":\"\\u0000\",\"title\":\"\\\"\xc3\xa9\\\"\\n\"},\"crc"))
        << footer;
    const Metadata again = parse_footer(footer.substr(0, footer.size() - 16), kPayloadBytes);
    EXPECT_EQ(again.user_metadata, metadata.user_metadata);
    EXPECT_EQ(again.checksums, metadata.checksums);
    EXPECT_EQ(encode_footer(again), footer);
  }
}

TEST(FooterUserMetadata, OfUnknownObjectsIsPassedOver) {
  const std::string json = R"({"x":{"metadata":{"a":1}},)" + std::string(kV3.substr(1));
  EXPECT_TRUE(parse_footer(json, kPayloadBytes).user_metadata.empty());
}

TEST(FooterChecksums, OfTheFooterThatDoesNotMatchIsCorruption) {
  const std::string json = std::string(kV3.substr(0, kV3.size() - 1)) + R"(,"footer_crc32c":"01234567"})";
  EXPECT_NE(error_of(json).find("does not match its checksum"), std::string::npos) << error_of(json);
}

TEST(FooterChecksums, AreReadAsTheyWereWritten) {
  for (const std::string_view json : {kV3, kV4}) {
    Metadata metadata = parse_footer(json, kPayloadBytes);
    EXPECT_FALSE(metadata.checksums.has_value());
    metadata.checksums = {.size_bytes = kPayloadBytes, .crc32c = {0x0badcafe}};
    const std::string footer = encode_footer(metadata);
    const Metadata again = parse_footer(footer.substr(0, footer.size() - 16), kPayloadBytes);
    EXPECT_EQ(again.checksums, metadata.checksums);
    EXPECT_EQ(encode_footer(again), footer);
    EXPECT_TRUE(again.warnings.empty());
  }
}

class Accepted : public ::testing::TestWithParam<Change> {};

TEST_P(Accepted, WithTheSameTensors) {
  const Metadata original = parse_footer(GetParam().good, kPayloadBytes);
  const Metadata changed = parse_footer(GetParam().text(), kPayloadBytes);
  EXPECT_EQ(changed.warnings, original.warnings);
  EXPECT_EQ(encode_footer(changed), encode_footer(original));
}

INSTANTIATE_TEST_SUITE_P(
    Footer, Accepted,
    ::testing::ValuesIn(std::vector<Change>{
        {"SpaceAroundIt", kV3, "{", " \n{ ", ""},
        {"UnknownKeyInFooter", kV3, "{", R"({"checksums":{"algorithm":"crc32c","pieces":[1,2.5,null,true]},)", ""},
        {"UnknownKeyInRecord", kV3, R"("length":4)", R"("length":4,"crc32c":[4294967295])", ""},
        {"EightDeep", kV3, "{", R"({"x":[[[[[[[]]]]]]],)", ""},
        {"KnownKeysInsideAnUnknownOne", kV3, "{", R"({"x":{"format":1,"index":[],"name":null},)", ""},
        {"UnknownKeyOfAnyNumber", kV3, "{", R"({"a":-1,"b":18446744073709551615,"c":1e300,)", ""},
        {"TorchAliasAsDType", kV3, "float32", "float", ""},
        {"KeyWrittenWithEscapes", kV3, R"("shape")", R"("\u0073hape")", ""},
        {"NameWrittenWithEscapes", kV3, R"("w")", R"("\u0077")", ""},
        {"MacroblockMissingMeans0", kV4, R"(,"macroblock":0)", "", ""},
        {"MacroblockNullMeans0", kV4, R"("macroblock":0)", R"("macroblock":null)", ""},
        {"IndexBeforeMacroblocks", kV4, "",
         R"({"index":[{"macroblock":0,"length":4,"offset":0,"shape":[2,2],"name":"w"},)"
         R"({"name":"ids","shape":[3],"offset":0,"length":3,"macroblock":1}],"macroblocks":[)"
         R"({"length_elems":4,"dtype":"float32","offset_bytes":0,"length_bytes":16},)"
         R"({"dtype":"int64","offset_bytes":16,"length_bytes":24,"length_elems":3}],)"
         R"("align_bytes":16,"format":"flashpack_v4"})",
         ""},
    }),
    test_name);

class Warned : public ::testing::TestWithParam<Change> {};

TEST_P(Warned, InOneSentence) {
  const Metadata metadata = parse_footer(GetParam().text(), kPayloadBytes);
  ASSERT_EQ(metadata.warnings.size(), 1U);
  EXPECT_EQ(metadata.warnings.front(), GetParam().expected);
}

INSTANTIATE_TEST_SUITE_P(Footer, Warned,
                         ::testing::ValuesIn(std::vector<Change>{
                             {"TotalElemsDisagrees", kV4, R"("total_elems":7)", R"("total_elems":8)",
                              "total_elems is 8, but the macroblocks have 7 elements."},
                             {"TotalPayloadBytesDisagrees", kV4, R"("total_payload_bytes":40)",
                              R"("total_payload_bytes":48)",
                              "total_payload_bytes is 48, but the last macroblock ends at 40."},
                         }),
                         test_name);

TEST(Footer, GapBeforeItIsWorthAWarning) {
  const std::vector<std::string> expected = {
      "4 bytes between the last macroblock and the footer belong to no macroblock."};
  EXPECT_EQ(parse_footer(kV3, kPayloadBytes + 4).warnings, expected);
}

TEST(Footer, GapBeforeItIsRefusedWhereChecksumsCoverItAndNobodyReadsIt) {
  std::string json(kV3);
  json.insert(1, R"("crc32c_per_mib":"01234567",)");
  EXPECT_TRUE(parse_footer(json, kPayloadBytes).checksums);
  const std::string error = error_of(json, kPayloadBytes + 4);
  EXPECT_NE(error.find("4 bytes between the last macroblock and the footer"), std::string::npos) << error;
}

TEST(Footer, TwoNamesForOneRangeAreRefusedBecauseEachWouldTakeMemory) {
  std::string json(kV3);
  json.insert(json.size() - 2, R"(,{"name":"tied","shape":[4],"offset":0,"length":4})");
  EXPECT_NE(error_of(json).find(R"(record 2 "tied" overlaps record 0 "w")"), std::string::npos) << error_of(json);
}

TEST(Footer, MoreRecordsThanAFileCanHaveAreRefused) {
  constexpr std::size_t kMost = std::size_t{1} << 20;
  std::string json = R"({"format":"flashpack_v3","target_dtype":"int8","align_bytes":0,"total_elems":0,"index":[)";
  for (std::size_t i = 0; i < kMost; ++i) {
    json += (i > 0 ? R"(,{"name":")" : R"({"name":")") + std::to_string(i) + R"(","shape":[0],"offset":0,"length":0})";
  }
  EXPECT_EQ(parse_footer(json + "]}", 0).records.size(), kMost);
  EXPECT_NE(error_of(json + ",{}]}").find("more than 1048576 records"), std::string::npos);
}

TEST(Footer, MoreMacroblocksThanAFileCanHaveAreRefused) {
  constexpr std::size_t kMost = std::size_t{1} << 20;
  constexpr std::string_view kBlock = R"({"dtype":"int8","offset_bytes":0,"length_bytes":0,"length_elems":0})";
  std::string json = R"({"format":"flashpack_v4","align_bytes":0,"index":[],"macroblocks":[)" + std::string(kBlock);
  for (std::size_t i = 1; i < kMost; ++i) json.append(",").append(kBlock);
  EXPECT_EQ(parse_footer(json + "]}", 0).container.macroblocks.size(), kMost);
  EXPECT_NE(error_of(json + ",{}]}").find("more than 1048576 macroblocks"), std::string::npos);
}

TEST(Footer, WhatIsEmptyMayLieInsideWhatIsNot) {
  std::string json(kV4);
  const std::string_view block = R"({"dtype":"int8","offset_bytes":20,"length_bytes":0,"length_elems":0},)";
  json.insert(json.find(R"({"dtype":"float32")"), block);
  json.replace(json.find(R"("macroblock":1)"), 14, R"("macroblock":2)");
  json.replace(json.find(R"("macroblock":0)"), 14, R"("macroblock":1)");
  json.insert(json.size() - 2, R"(,{"name":"empty","shape":[0],"offset":2,"length":0,"macroblock":2})");
  EXPECT_EQ(parse_footer(json, kPayloadBytes).records.size(), 3U);
}

TEST(Footer, WithoutRecordsIsAnEmptyCheckpoint) {
  const Metadata metadata =
      parse_footer(R"({"format":"flashpack_v3","target_dtype":"int8","align_bytes":0,"total_elems":0,"index":[]})", 0);
  EXPECT_TRUE(metadata.records.empty());
}

TEST(Footer, ErrorInTheJsonSaysWhereInTheFileItIs) {
  try {
    parse_footer(R"({"format":!})", 1000, "evil.flashpack");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.offset_bytes(), 1010U);
  }
}

TEST(Footer, ErrorsCutLongNamesBetweenCharacters) {
  std::string name = "x";
  for (int i = 0; i < 1000; ++i) name += "é";
  std::string json(kV3);
  json.replace(json.find(R"("b")"), 3, '"' + name + '"').replace(json.find(R"("offset":8)"), 10, R"("offset":7)");
  const std::string error = error_of(json);
  EXPECT_LT(error.size(), 400U);
  EXPECT_NE(error.find("é\"... is misaligned"), std::string::npos) << error;
}

TEST(Footer, ErrorsWithControlCharactersInNamesAreOneLine) {
  std::string json(kV3);
  json.replace(json.find(R"("b")"), 3, R"("\n\u001b[2J")").replace(json.find(R"("offset":8)"), 10, R"("offset":7)");
  const std::string error = error_of(json);
  EXPECT_EQ(error.find_first_of("\n\x1b"), std::string::npos);
}

}  // namespace
}  // namespace flashpack
