#include "flashpack/checkpoint.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <functional>
#include <type_traits>

#include "flashpack/engine.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

static_assert(std::is_nothrow_move_constructible_v<Checkpoint> && !std::is_copy_constructible_v<Checkpoint>);

using Names = std::vector<std::string>;

class OpenCheckpoint : public ::testing::Test {
 protected:
  std::filesystem::path path(const std::string& name) const { return directory_ / name; }

  std::filesystem::path write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path(name), std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    return path(name);
  }

  /// A safetensors file with tensors of one byte each.
  std::filesystem::path write_shard(const std::string& name, const Names& tensors,
                                    const std::string& metadata = "{}") const {
    std::string json = R"({"__metadata__":)" + metadata;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      json += ",\"" + tensors[i] + R"(":{"dtype":"U8","shape":[1],"data_offsets":[)" + std::to_string(i) + "," +
              std::to_string(i + 1) + "]}";
    }
    json += "}";
    std::string length(sizeof(std::uint64_t), '\0');
    const std::uint64_t json_bytes = json.size();
    std::memcpy(length.data(), &json_bytes, length.size());
    return write(name, length + json + std::string(tensors.size(), 'x'));
  }

  std::filesystem::path write_flashpack(const std::string& name, const Names& tensors) const {
    std::vector<TensorSpec> specs;
    for (const std::string& tensor : tensors) specs.push_back({tensor, DType::kUInt8, {1}});
    const Metadata metadata = make_layout(specs, 0);
    return write(name, std::string(metadata.payload_bytes, 'x') + encode_footer(metadata));
  }

  std::filesystem::path write_index(const std::string& name, const std::string& weight_map) const {
    return write(name, R"({"metadata":{"total_size":3},"weight_map":)" + weight_map + "}");
  }

  static Names names_in(const Checkpoint& checkpoint) {
    Names names;
    for (std::size_t i = 0; i < checkpoint.size(); ++i) names.push_back(checkpoint.record(i).name);
    return names;
  }
  static Names names_in(const std::filesystem::path& path) { return names_in(open_checkpoint(path)); }

  static std::string error_of(const std::filesystem::path& path, std::error_code expected = Errc::kBadFile) {
    try {
      open_checkpoint(path);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), expected) << error.what();
      return error.what();
    }
    return "opened";
  }

  const testing::TempDir directory_;
};

#define EXPECT_SAYS(error, text) EXPECT_NE((error).find(text), std::string::npos) << (error)

TEST_F(OpenCheckpoint, AFileOfEitherFormatIsACheckpointOfItsRecords) {
  EXPECT_EQ(names_in(write_shard("a.safetensors", {"b", "a"})), (Names{"b", "a"}));
  EXPECT_EQ(names_in(write_flashpack("b.flashpack", {"c"})), (Names{"c"}));
}

TEST_F(OpenCheckpoint, AnIndexIsACheckpointOfAllItsFiles) {
  write_shard("2.safetensors", {"c"});
  write_shard("1.safetensors", {"b", "a"});
  const Checkpoint checkpoint = open_checkpoint(
      write_index("model.safetensors.index.json", R"({"a":"1.safetensors","c":"2.safetensors","b":"1.safetensors"})"));
  EXPECT_EQ(names_in(checkpoint), (Names{"b", "a", "c"}));
  ASSERT_EQ(checkpoint.files().size(), 2U);
  EXPECT_EQ(checkpoint.file_of(2), 1U);
  EXPECT_EQ(checkpoint.record_of(2), 0U);
  EXPECT_EQ(checkpoint.files()[1].path, path("2.safetensors"));
}

TEST_F(OpenCheckpoint, AnIndexMayHaveAVariantAndListFlashpackFiles) {
  write_flashpack("1.flashpack", {"a"});
  EXPECT_EQ(names_in(write_index("model.flashpack.index.fp16.json", R"({"a":"1.flashpack"})")), (Names{"a"}));
}

TEST_F(OpenCheckpoint, AnIndexDecidesWhichFileHasATensor) {
  write_shard("1.safetensors", {"a", "tied"});
  write_shard("2.safetensors", {"tied", "b"});
  const auto index = write_index("model.safetensors.index.json",
                                 R"({"a":"1.safetensors","tied":"2.safetensors","b":"2.safetensors"})");
  EXPECT_EQ(names_in(index), (Names{"a", "tied", "b"}));
}

TEST_F(OpenCheckpoint, TensorsThatAnIndexDoesNotListAreTakenUnlessTwoFilesHaveThem) {
  write_shard("1.safetensors", {"a", "rest"});
  write_shard("2.safetensors", {"b"});
  const std::string map = R"({"a":"1.safetensors","b":"2.safetensors"})";
  EXPECT_EQ(names_in(write_index("model.safetensors.index.json", map)), (Names{"a", "rest", "b"}));
  write_shard("2.safetensors", {"b", "rest"});
  const std::string error = error_of(path("model.safetensors.index.json"));
  EXPECT_SAYS(error, R"(both have "rest", and the index does not list it)");
  EXPECT_SAYS(error, path("1.safetensors").string());
  EXPECT_SAYS(error, path("2.safetensors").string());
}

TEST_F(OpenCheckpoint, AnIndexThatNamesATensorThatItsFileLacksIsRefused) {
  write_shard("1.safetensors", {"a"});
  write_shard("2.safetensors", {"b"});
  const std::string error = error_of(
      write_index("model.safetensors.index.json", R"({"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"})"));
  EXPECT_SAYS(error, R"("b" is in 1.safetensors, but it is not)");
}

TEST_F(OpenCheckpoint, AnIndexThatNamesAFileThatIsAbsentIsAnErrorThatNamesBoth) {
  write_shard("1.safetensors", {"a"});
  const auto index = write_index("model.safetensors.index.json", R"({"a":"1.safetensors","b":"2.safetensors"})");
  const std::string error = error_of(index, std::make_error_code(std::errc::no_such_file_or_directory));
  EXPECT_SAYS(error, index.string());
  EXPECT_SAYS(error, path("2.safetensors").string());
}

TEST_F(OpenCheckpoint, AnIndexCannotLeadOutOfItsDirectory) {
  for (const std::string name : {"../a.safetensors", "/etc/passwd", "x/../a.safetensors", "..", ".", "", "a\\u0000b"}) {
    const auto index = write_index("model.safetensors.index.json", "{\"a\":\"" + name + "\"}");
    EXPECT_SAYS(error_of(index), "which is no file beside it");
  }
}

TEST_F(OpenCheckpoint, ADirectoryAndAnIndexAreNotTakenInAListOfFiles) {
  const auto file = write_shard("1.safetensors", {"a"});
  const auto index = write_index("model.safetensors.index.json", R"({"a":"1.safetensors"})");
  for (const auto& other : {directory_.path(), index}) {
    const std::vector paths{file, other};
    try {
      open_checkpoint(paths);
      FAIL() << other;
    } catch (const Error& error) {
      EXPECT_SAYS(std::string(error.what()), other.string());
      EXPECT_SAYS(std::string(error.what()), "in a list of files: give its path alone");
    }
  }
}

TEST_F(OpenCheckpoint, OfADirectoryAFlashPackFileTakesThePlaceOfTheSafetensorsFileOfItsName) {
  write_shard("adapter.safetensors", {"old"});
  write_flashpack("adapter.flashpack", {"new"});
  EXPECT_EQ(names_in(directory_.path()), Names{"new"});
  write_shard("adapter.b.safetensors", {"other"});
  EXPECT_SAYS(error_of(directory_.path()), "several checkpoints");
}

TEST_F(OpenCheckpoint, OfADirectoryTheUsualNamesComeFirst) {
  write_shard("other.safetensors", {"other"});
  EXPECT_EQ(names_in(directory_.path()), (Names{"other"}));
  write_shard("diffusion_pytorch_model.safetensors", {"diffusers"});
  EXPECT_EQ(names_in(directory_.path()), (Names{"diffusers"}));
  write_index("model.safetensors.index.json", R"({"other":"other.safetensors"})");
  EXPECT_EQ(names_in(directory_.path()), (Names{"other"}));
  write_shard("model.safetensors", {"transformers"});
  EXPECT_EQ(names_in(directory_.path()), (Names{"transformers"}));
  write_flashpack("model.flashpack", {"flashpack"});
  EXPECT_EQ(names_in(directory_.path()), (Names{"flashpack"}));
}

TEST_F(OpenCheckpoint, ADirectoryWithoutOneThatIsMeantIsRefused) {
  EXPECT_SAYS(error_of(directory_.path(), std::make_error_code(std::errc::is_a_directory)),
              "which has no flashpack or safetensors file and no index");
  write_shard(".hidden.safetensors", {"a"});
  write("config.json", "{}");
  EXPECT_SAYS(error_of(directory_.path(), std::make_error_code(std::errc::is_a_directory)),
              "which has no flashpack or safetensors file and no index");
  write_shard("1.safetensors", {"a"});
  write_shard("2.safetensors", {"b"});
  EXPECT_SAYS(error_of(directory_.path()), "it has several checkpoints, none of a usual name");
  write_index("weights.safetensors.index.json", R"({"a":"1.safetensors","b":"2.safetensors"})");
  EXPECT_EQ(names_in(directory_.path()), (Names{"a", "b"}));
}

TEST_F(OpenCheckpoint, SeveralFilesAreOneCheckpointInTheOrderGivenAndMayNotShareNames) {
  const std::vector<std::filesystem::path> files = {write_shard("2.safetensors", {"b"}),
                                                    write_flashpack("1.flashpack", {"a"})};
  EXPECT_EQ(names_in(open_checkpoint(files)), (Names{"b", "a"}));
  write_flashpack("1.flashpack", {"b"});
  EXPECT_THROW(open_checkpoint(files), Error);
  EXPECT_THROW(open_checkpoint(std::span<const std::filesystem::path>()), Error);
}

TEST_F(OpenCheckpoint, MetadataOfSeveralFilesIsThatInWhichTheyAgree) {
  const std::vector<std::filesystem::path> files = {write_shard("1", {"a"}, R"({"format":"pt","part":"1"})"),
                                                    write_shard("2", {"b"}, R"({"part":"2","title":"x"})"),
                                                    write_shard("3", {"c"}, R"({"part":"1","format":"pt"})")};
  EXPECT_EQ(open_checkpoint(files).user_metadata(),
            (std::map<std::string, std::string>{{"format", "pt"}, {"title", "x"}}));
}

TEST_F(OpenCheckpoint, FilesThatAreReplacedLaterAreReadAsTheyWere) {
  const auto file = write_shard("1.safetensors", {"a"});
  const Checkpoint checkpoint = open_checkpoint(file);
  write_shard("new", {"a", "b"});
  std::filesystem::rename(path("new"), file);
  EXPECT_EQ(identity_of(checkpoint.files()[0].fd.get()), checkpoint.files()[0].metadata.identity);
}

TEST_F(OpenCheckpoint, FilesAreClosedWithTheCheckpointAndAfterAnError) {
  const auto free_descriptor = [] {
    const int fd = ::dup(0);
    ::close(fd);
    return fd;
  };
  const int before = free_descriptor();
  write_shard("1.safetensors", {"a"});
  write_shard("2.safetensors", {"a"});
  const std::vector<std::filesystem::path> both = {path("1.safetensors"), path("2.safetensors")};
  {
    Checkpoint first = open_checkpoint(both[0]);
    Checkpoint second = open_checkpoint(both[1]);
    second = std::move(first);
    const Checkpoint third = std::move(second);
    EXPECT_EQ(third.size(), 1U);
    EXPECT_GT(free_descriptor(), before);
  }
  EXPECT_THROW(open_checkpoint(both), Error);
  EXPECT_THROW(open_checkpoint(std::vector<std::filesystem::path>{both[0], path("absent")}), Error);
  EXPECT_EQ(free_descriptor(), before);
}

TEST_F(OpenCheckpoint, ProgramsWithoutExceptionsGetTheCodeOfTheError) {
  std::error_code error = Errc::kCancelled;
  const std::vector<std::filesystem::path> files = {write_shard("b.safetensors", {"b"}), write_flashpack("a.x", {"a"})};
  const std::optional<Checkpoint> one = open_checkpoint(files[0], error);
  ASSERT_TRUE(one && !error);
  EXPECT_EQ(names_in(*one), Names{"b"});
  const std::optional<Checkpoint> both = open_checkpoint(files, error);
  ASSERT_TRUE(both && !error);
  EXPECT_EQ(names_in(*both), (Names{"b", "a"}));
  EXPECT_FALSE(open_checkpoint(path("absent"), error));
  EXPECT_EQ(error, std::errc::no_such_file_or_directory);
  EXPECT_FALSE(open_checkpoint(std::span<const std::filesystem::path>(), error));
  EXPECT_EQ(error, Errc::kInvalidArgument);

  const std::optional<Metadata> read = read_metadata(files[1], {}, error);
  ASSERT_TRUE(read && !error);
  EXPECT_EQ(read->records.front().name, "a");
  EXPECT_EQ(read_metadata(one->files()[0].fd.get(), files[0], {}, error)->records.front().name, "b");
  EXPECT_FALSE(read_metadata(files[0], {.max_footer_bytes = 1}, error));
  EXPECT_EQ(error, Errc::kBadFile);
}

TEST_F(OpenCheckpoint, IsReadOutOfALargerFileWithTheOffsetOfItsBeginningAdded) {
  const std::vector<TensorSpec> specs = {{"a", DType::kUInt8, {5}}, {"b", DType::kFloat32, {3000}}};
  const Metadata metadata = make_layout(specs, 0);
  std::string checkpoint(metadata.payload_bytes, '\0');
  for (std::size_t i = 0; i < checkpoint.size(); ++i) checkpoint[i] = static_cast<char>(i * i >> 3);
  checkpoint += encode_footer(metadata);
  const std::uint64_t footer_bytes = checkpoint.size() - metadata.payload_bytes - 16;  // Length and magic follow it.
  const Metadata found =
      parse_footer(checkpoint.substr(metadata.payload_bytes, footer_bytes), metadata.payload_bytes, "container");
  const std::string before(12'345, 'x');
  const auto container = write("container", before + checkpoint + "after");
  std::vector<std::string> tensors;
  FileExtents file{.path = container};
  for (const TensorRecord& record : found.records) tensors.emplace_back(record.size_bytes, '\0');
  for (std::size_t i = 0; i < tensors.size(); ++i)
    file.extents.push_back({before.size() + found.records[i].offset_bytes, tensors[i].size(), tensors[i].data()});
  Engine({.chunk_bytes = 1 << 20, .staging_bytes = 2 << 20, .workers = 2}).load({.files = {file}});
  for (std::size_t i = 0; i < tensors.size(); ++i)
    EXPECT_EQ(tensors[i], checkpoint.substr(found.records[i].offset_bytes, tensors[i].size()));
}

}  // namespace
}  // namespace flashpack
