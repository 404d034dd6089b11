#include "torch_binding/format/json_reader.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

namespace flashpack {
namespace {

/// Why `text` is refused when all of it is passed over.
JsonError error_of(std::string_view text) {
  try {
    JsonReader json(text);
    json.skip();
    json.end();
  } catch (const JsonError& error) {
    return error;
  }
  return {JsonError::Subject::kText, "is accepted"};
}

std::string error_when(std::string_view text, void (*read)(JsonReader&)) {
  try {
    JsonReader json(text);
    read(json);
  } catch (const JsonError& error) {
    EXPECT_EQ(error.subject(), JsonError::Subject::kValue);
    return error.what();
  }
  return "is accepted";
}

/// {"k0":0,"k1":1,...}, of more bytes than are parsed at once.
std::string large_object(std::size_t keys) {
  std::string text = "{";
  for (std::size_t i = 0; i < keys; ++i) {
    text += (i > 0 ? ",\"k" : "\"k") + std::to_string(i) + "\":" + std::to_string(i);
  }
  return text;
}

TEST(JsonReader, GivesValuesInTheOrderOfTheText) {
  JsonReader json(R"( {"a":[1,2],"b":null,"c":{"d":"e\u0066"},"g":[]} )");
  std::string seen;
  json.object([&](std::string_view key) {
    seen += key;
    if (key == "a") json.array([&] { seen += std::to_string(json.count()); });
    if (key == "b") seen += json.null() ? "0" : "1";
    if (key == "c") json.object([&](std::string_view inner) { seen.append(inner).append(json.string()); });
    if (key == "g") json.array([] { ADD_FAILURE(); });
  });
  json.end();
  EXPECT_EQ(seen, "a12b0cdefg");
}

TEST(JsonReader, NullIsReadOnlyWhereItStands) {
  JsonReader json("[3]");
  json.array([&] {
    EXPECT_FALSE(json.null());
    EXPECT_EQ(json.count(), 3U);
  });
}

TEST(JsonReader, ValuesOfAnotherTypeAreRefused) {
  EXPECT_EQ(error_when("[]", [](JsonReader& json) { json.object([](auto) {}); }), "must be an object");
  EXPECT_EQ(error_when("{}", [](JsonReader& json) { json.array([] {}); }), "must be an array");
  EXPECT_EQ(error_when("7", [](JsonReader& json) { json.string(); }), "must be a string");
  EXPECT_EQ(error_when("\"7\"", [](JsonReader& json) { json.count(); }), "must be an integer");
  EXPECT_EQ(error_when("7.0", [](JsonReader& json) { json.count(); }), "must be an integer");
  EXPECT_EQ(error_when("-7", [](JsonReader& json) { json.count(); }), "must be >= 0, not -7");
  EXPECT_EQ(error_when("9223372036854775808", [](JsonReader& json) { json.count(); }),
            "is 9223372036854775808, which is past 2^63");
}

TEST(JsonReader, NumbersUpTo2To63AreRead) { EXPECT_EQ(JsonReader("9223372036854775807").count(), (1ULL << 63) - 1); }

TEST(JsonReader, ErrorsInTheTextSayWhere) {
  const std::string ahead = large_object(10'000);
  const JsonError error = error_of(ahead + "!");
  EXPECT_EQ(error.subject(), JsonError::Subject::kText);
  EXPECT_EQ(error.offset_bytes(), ahead.size());
  EXPECT_EQ(error_of(ahead + "}  {}").offset_bytes(), ahead.size() + 3);
  EXPECT_STREQ(error_of(ahead + "}  {}").what(), "goes on after its JSON ends");
  EXPECT_STREQ(error_of(ahead + "}  ").what(), "is accepted");
  EXPECT_STREQ(error_of(ahead).what(), "is not valid JSON: incomplete JSON");
}

TEST(JsonReader, WhatStandsBeforeAnErrorIsReadFirst) {
  JsonReader json("[1,2,!");
  std::vector<std::uint64_t> counts;
  EXPECT_THROW(json.array([&] { counts.push_back(json.count()); }), JsonError);
  EXPECT_EQ(counts, (std::vector<std::uint64_t>{1, 2}));
  EXPECT_THROW(json.count(), JsonError) << "the error stays";
}

TEST(JsonReader, AKeyThatStandsTwiceIsRefusedAtTheEndOfItsObject) {
  for (const std::size_t keys : {2U, 16U, 17U, 10'000U}) {
    const JsonError error = error_of("[{" + large_object(keys).substr(1) + R"(,"\u006b1":{}},7])");
    EXPECT_EQ(error.subject(), JsonError::Subject::kObject);
    EXPECT_STREQ(error.what(), R"(has the key "k1" twice)") << keys;
    EXPECT_STREQ(error_of(large_object(keys) + R"(,"x":{"k1":{"k1":{}}}})").what(), "is accepted");
  }
}

TEST(JsonReader, AStringMayBeLongerThanWhatIsParsedAtOnce) {
  const std::string plain(100'000, 'x');
  const std::string text = "[\"" + plain + "\",\"\\n" + plain + "\",\"y\"]";
  std::vector<std::string> strings;
  JsonReader json(text);
  json.array([&] { strings.push_back(json.string()); });
  EXPECT_EQ(strings, (std::vector<std::string>{plain, "\n" + plain, "y"}));
}

TEST(JsonReader, ReadsTheSameWhereverTheTextIsCutForParsing) {
  constexpr std::string_view kText = R"({"k\u0065y":["\ud83d\ude00é","plain",-12345,1.5e-3,true,null],"b":{}})";
  for (std::size_t cut = 0; cut <= kText.size(); ++cut) {
    const std::string text =
        std::string(JsonReader::kWindowBytes - cut, ' ').append(kText).append(JsonReader::kWindowBytes, ' ');
    JsonReader json(text);
    json.object([&](std::string_view key) {
      if (key != "key") return json.skip();
      json.array([&, first = true]() mutable {
        if (!std::exchange(first, false)) return json.skip();
        EXPECT_EQ(json.string(), "\xf0\x9f\x98\x80é") << cut;
      });
    });
    json.end();
    const bool is_whole = cut == kText.size();
    EXPECT_EQ(error_of(text.substr(0, JsonReader::kWindowBytes)).what() == std::string_view("is accepted"), is_whole)
        << cut;
  }
}

TEST(JsonReader, AHeaderOfManyTensorsIsReadWhole) {
  constexpr std::size_t kTensors = 100'000;
  std::string text = "{";
  for (std::size_t i = 0; i < kTensors; ++i) {
    const std::string at = std::to_string(i);
    text += "\"layer." + at + R"(.weight":{"dtype":"BF16","shape":[1],"data_offsets":[)" + at + "," + at + "]},";
  }
  text.back() = '}';
  std::size_t tensors = 0;
  JsonReader json(text);
  json.object([&](std::string_view) {
    ++tensors;
    json.skip();
  });
  json.end();
  EXPECT_EQ(tensors, kTensors);
}

TEST(JsonReader, NineLevelsAreTooDeep) {
  EXPECT_STREQ(error_of("[[[[[[[[]]]]]]]]").what(), "is accepted");
  EXPECT_STREQ(error_of("[[[[[[[[[]]]]]]]]]").what(), "is not valid JSON: too deep");
}

TEST(JsonReader, MoreThan2To20KeysAreTooMany) {
  constexpr std::size_t kMost = std::size_t{1} << 20;
  EXPECT_STREQ(error_of(large_object(kMost) + "}").what(), "is accepted");
  EXPECT_STREQ(error_of(large_object(kMost + 1) + "}").what(), "is not valid JSON: object too large");
}

}  // namespace
}  // namespace flashpack
