#include "torch_binding/format/index.h"

#include <gtest/gtest.h>

#include <fstream>
#include <string>

#include "flashpack/error.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

std::string error_of(std::string_view text) {
  try {
    parse_index(text, "model.safetensors.index.json");
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kBadFile);
    EXPECT_EQ(error.path(), "model.safetensors.index.json");
    return error.what();
  }
  return "parsed";
}

#define EXPECT_SAYS(error, text) EXPECT_NE((error).find(text), std::string::npos) << (error)

TEST(IndexName, EndsWithIndexJsonAndMayHaveAVariant) {
  EXPECT_EQ(without_index_suffix("x/model.safetensors.index.json"), "x/model.safetensors");
  EXPECT_EQ(without_index_suffix("model.safetensors.index.fp16.json"), "model.safetensors");
  EXPECT_EQ(without_index_suffix("/x/model.fp16.safetensors.index.json"), "/x/model.fp16.safetensors");
  EXPECT_TRUE(is_index("model.bin.index.json"));
}

TEST(IndexName, IsNotThatOfOtherFiles) {
  for (const std::filesystem::path name :
       {"", "model.safetensors", "config.json", "model_index.json", "index.json", "a.index", "a.index.b.c.json",
        "a.index.json/config.json", "a.index.json.bak", "a.index.JSON"}) {
    EXPECT_EQ(without_index_suffix(name), name);
    EXPECT_FALSE(is_index(name)) << name;
  }
}

TEST(PlainName, LeadsNowhereElse) {
  for (const std::string_view name : {"a", "model-00001-of-00002.safetensors", "...", ".hidden", "\xc3\xa9", "a b"})
    EXPECT_TRUE(is_plain_name(name)) << name;
  using std::string_view_literals::operator""sv;
  for (const std::string_view name : {""sv, "."sv, ".."sv, "/"sv, "/etc/passwd"sv, "../a"sv, "a/"sv, "a\0b"sv})
    EXPECT_FALSE(is_plain_name(name)) << name;
}

std::vector<std::pair<std::uint32_t, std::uint32_t>> taken_of(const std::vector<Shard>& shards, const WeightMap& map) {
  std::vector<std::pair<std::uint32_t, std::uint32_t>> taken;
  for (const auto& [shard, name] : places_in(shards, "m.index.json", map)) taken.emplace_back(shard, name);
  return taken;
}

std::string error_of(const std::vector<Shard>& shards, const WeightMap& map) {
  try {
    taken_of(shards, map);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kBadFile);
    return error.what();
  }
  return "taken";
}

using Places = std::vector<std::pair<std::uint32_t, std::uint32_t>>;

TEST(PlacesInShards, AreAllTensorsShardByShardWhereThereIsNoIndex) {
  EXPECT_EQ(taken_of({{"x/1", {"b", "a"}}, {"x/2", {"c"}}}, {}), (Places{{0, 0}, {0, 1}, {1, 0}}));
  EXPECT_EQ(taken_of({{"x/1", {}}}, {}), Places{});
  EXPECT_SAYS(error_of({{"x/1", {"b", "a"}}, {"x/2", {"a"}}}, {}), R"(x/1 and x/2 both have "a": )");
}

TEST(PlacesInShards, AreThoseOfTheFilesThatTheIndexNamesAndWhatItDoesNotList) {
  const std::vector<Shard> shards = {{"x/1", {"a", "tied", "rest"}}, {"x/2", {"tied", "b"}}};
  EXPECT_EQ(taken_of(shards, {{"tied", "2"}, {"b", "2"}}), (Places{{0, 0}, {0, 2}, {1, 0}, {1, 1}}));
  EXPECT_SAYS(error_of(shards, {{"b", "2"}}), R"(both have "tied", and the index does not list it)");
  EXPECT_SAYS(error_of(shards, {{"tied", "1"}, {"b", "1"}}), R"("b" is in 1, but it is not)");
  EXPECT_SAYS(error_of(shards, {{"tied", "1"}, {"z", "2"}}), R"("z" is in 2, but it is not)");
}

TEST(Index, IsReadWhateverTheFormatOfItsFilesAndWhetherTheyAreThere) {
  const testing::TempDir directory;
  const std::filesystem::path path = directory / "pytorch_model.bin.index.json";
  std::ofstream(path) << R"({"metadata":{"total_size":3},"weight_map":{"b":"1.bin","a":"2.bin"}})";
  EXPECT_EQ(read_index(path), (WeightMap{{"a", "2.bin"}, {"b", "1.bin"}}));
}

TEST(Index, ThatIsNoFileOrTooLargeOrAbsentIsRefusedByItsPath) {
  const testing::TempDir directory;
  const std::filesystem::path path = directory / "model.safetensors.index.json";
  const auto error = [&] {
    try {
      read_index(path);
    } catch (const Error& refused) {
      EXPECT_EQ(refused.path(), path);
      return std::string(refused.what());
    }
    return std::string("read");
  };
  EXPECT_SAYS(error(), "open " + path.string() + ": No such file or directory");
  std::filesystem::create_directory(path);
  EXPECT_SAYS(error(), "read " + path.string() + ": Is a directory");
  std::filesystem::remove(path);
  std::ofstream(path) << "{}";
  std::filesystem::resize_file(path, (std::uint64_t{256} << 20) + 1);
  EXPECT_SAYS(error(), "read " + path.string() + ": its text of 268435457 bytes is over the limit of 268435456");
}

TEST(Index, OfAnotherTypeOrWithoutFilesIsRefused) {
  for (const std::string_view text : {"", "[]", "{", R"({"weight_map":[]})", R"({"weight_map":{"a":1}})", "{}x",
                                      R"({"weight_map":{}})", R"({"a":{}})", R"({"weight_map":{"a":"b","a":"c"}})"}) {
    EXPECT_SAYS(error_of(text), "it is not the index of a sharded checkpoint");
  }
}

TEST(Index, SaysWhichOfItsValuesIsWrong) {
  EXPECT_SAYS(error_of("[]"), "it must be an object");
  EXPECT_SAYS(error_of(R"({"weight_map":[]})"), "weight_map must be an object");
  EXPECT_SAYS(error_of(R"({"weight_map":{"a":"b","c":1}})"), "the file of \"c\" must be a string");
  EXPECT_SAYS(error_of(R"({"a":1,"a":2})"), "an object has the key \"a\" twice");
  EXPECT_SAYS(error_of(R"({"weight_map":)"), "sharded checkpoint: the text ");
}

TEST(Index, OfWhichTheTextIsSomethingElseSaysWhat) {
  EXPECT_SAYS(error_of("\xef\xbb\xbf{}"), "it begins with a byte order mark: save it as UTF-8 without one");
  EXPECT_SAYS(error_of("<!DOCTYPE html>"), "it is a web page");
  EXPECT_SAYS(error_of(""), "it is empty");
}

}  // namespace
}  // namespace flashpack
