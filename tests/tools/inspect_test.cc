#include <gtest/gtest.h>
#include <unistd.h>

#include <boost/json/parse.hpp>
#include <cstdlib>
#include <fstream>

#include "flashpack/engine.h"
#include "flashpack/format.h"
#include "tests/format/golden_files.h"
#include "tests/support/run.h"

namespace flashpack {
namespace {

using testing::Outcome;

/// Runs flashpack_inspect with shell text as its arguments.
Outcome inspect(const std::string& arguments) { return testing::run("'" FLASHPACK_INSPECT "' " + arguments); }

std::string golden(const std::string& name) { return std::string(FLASHPACK_GOLDEN_DIR "/") + name + ".flashpack"; }

std::string quoted(const std::string& argument) { return "'" + argument + "'"; }

class Scratch {
 public:
  explicit Scratch(const std::string& bytes) {
    std::ofstream(path_, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  ~Scratch() { std::filesystem::remove(path_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_ = ::testing::TempDir() + "inspect_" + std::to_string(::getpid()) + ".flashpack";
};

class InspectGolden : public ::testing::TestWithParam<test::GoldenFile> {};

INSTANTIATE_TEST_SUITE_P(Files, InspectGolden, ::testing::ValuesIn(test::golden_files()),
                         [](const auto& file) { return file.param.name; });

TEST_P(InspectGolden, JsonListsEveryTensor) {
  const Outcome outcome = inspect("--json " + quoted(GetParam().path()));
  ASSERT_EQ(outcome.status, 0) << outcome.output;
  const boost::json::value report = boost::json::parse(outcome.output);
  const boost::json::array& tensors = report.at("tensors").as_array();
  ASSERT_EQ(tensors.size(), GetParam().tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    EXPECT_EQ(tensors[i].at("name").as_string(), GetParam().tensors[i].name);
    EXPECT_EQ(tensors[i].at("dtype").as_string(), dtype_name(GetParam().tensors[i].dtype));
    EXPECT_EQ(tensors[i].at("offset_bytes").to_number<std::uint64_t>(), GetParam().tensors[i].offset_bytes);
  }
}

TEST_P(InspectGolden, TextHasALineForEveryTensor) {
  const Outcome outcome = inspect(quoted(GetParam().path()));
  ASSERT_EQ(outcome.status, 0) << outcome.output;
  const std::size_t table = outcome.output.find("  tensor ");
  ASSERT_NE(table, std::string::npos);
  const auto lines =
      std::count(outcome.output.begin() + static_cast<std::ptrdiff_t>(table), outcome.output.end(), '\n');
  EXPECT_EQ(lines, static_cast<std::ptrdiff_t>(GetParam().tensors.size()) + 1);
}

TEST(Inspect, TextSaysWhereTensorsAre) {
  const Outcome outcome = inspect(quoted(golden("v4_mixed_align16")));
  EXPECT_NE(outcome.output.find("flashpack_v4"), std::string::npos);
  EXPECT_NE(outcome.output.find("float16, int8, float32, int64"), std::string::npos);
  EXPECT_NE(outcome.output.find("  i64     int64    []         48  8 bytes\n"), std::string::npos) << outcome.output;
}

TEST(Inspect, ShowsSafetensorsFiles) {
  const std::string json =
      R"({"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}})";
  const Scratch file(std::string{static_cast<char>(json.size())} + std::string(7, '\0') + json + "abcd");
  const std::string text = inspect(quoted(file.path())).output;
  EXPECT_NE(text.find("format       safetensors\n  dtypes       bfloat16\n"), std::string::npos) << text;
  EXPECT_NE(text.find("metadata     format: pt\n"), std::string::npos) << text;
  EXPECT_NE(text.find("w       bfloat16  [1, 2]"), std::string::npos) << text;
  EXPECT_EQ(text.find("macroblock"), std::string::npos) << text;
  const boost::json::value report = boost::json::parse(inspect("--json " + quoted(file.path())).output);
  EXPECT_EQ(report.at("format").as_string(), "safetensors");
  EXPECT_EQ(report.at("tensors").at(0).at("offset_bytes").to_number<std::uint64_t>(), 8 + json.size());
  EXPECT_FALSE(report.as_object().contains("macroblocks"));
}

TEST(Inspect, ShowsWarningsAndSucceeds) {
  std::string bytes = test::file_bytes(golden("v3_bool"));
  const Scratch file(bytes.insert(3, "gap"));
  const Outcome outcome = inspect(quoted(file.path()));
  EXPECT_EQ(outcome.status, 0);
  EXPECT_NE(outcome.output.find("warning: 3 bytes between"), std::string::npos) << outcome.output;
}

TEST(Inspect, HostileFileIsOneLineOnStandardError) {
  std::string bytes = test::file_bytes(golden("v3_f32_align128"));
  const Scratch file(bytes.replace(bytes.find("\"offset\":32"), 11, "\"offset\":-9"));
  EXPECT_EQ(inspect(quoted(file.path()) + " 2>/dev/null").output, "");
  const Outcome outcome = inspect(quoted(file.path()) + " 2>&1");
  EXPECT_EQ(outcome.status, 1);
  EXPECT_EQ(outcome.output, "flashpack_inspect: read " + file.path() +
                                ": record 1 \"b\": offset must be >= 0, not -9: not a valid checkpoint\n");
}

TEST(Inspect, NamesCannotDriveTheTerminal) {
  const std::vector<TensorSpec> tensors = {{"\x1b]0;evil\x07\xc2\x9b\x7f", DType::kInt8, {1}}};
  const Scratch file("x" + encode_footer(make_layout(tensors, 0)));
  const Outcome outcome = inspect(quoted(file.path()));
  EXPECT_EQ(outcome.status, 0);
  EXPECT_NE(outcome.output.find(R"(\x1b]0;evil\x07\x9b\x7f)"), std::string::npos) << outcome.output;
}

TEST(Inspect, ALongNameDoesNotMakeEveryRowAsLong) {
  std::vector<TensorSpec> tensors = {{std::string(100'000, 'x'), DType::kInt8, {1}}};
  for (int i = 0; i < 100; ++i) tensors.push_back({std::to_string(i), DType::kInt8, {1}});
  const Scratch file(std::string(101, 'x') + encode_footer(make_layout(tensors, 0)));
  const Outcome outcome = inspect(quoted(file.path()));
  EXPECT_EQ(outcome.status, 0);
  EXPECT_NE(outcome.output.find(tensors[0].name), std::string::npos) << "names are whole";
  EXPECT_LT(outcome.output.size(), 130'000U);
}

TEST(Inspect, ShowsTheMetadataOfTheUser) {
  Metadata metadata = make_layout(std::vector<TensorSpec>{{"a", DType::kInt8, {1}}}, 0);
  metadata.user_metadata = {{"format", "pt"}, {"title", "\x1b[2J"}};
  const Scratch file("x" + encode_footer(metadata));
  const std::string text = inspect(quoted(file.path())).output;
  EXPECT_NE(text.find("metadata     format: pt\n"), std::string::npos) << text;
  EXPECT_NE(text.find("title: \\x1b[2J\n"), std::string::npos) << text;
  const boost::json::value report = boost::json::parse(inspect("--json " + quoted(file.path())).output);
  EXPECT_EQ(report.at("metadata").at("title").as_string(), "\x1b[2J");
}

TEST(Inspect, MissingFileExitsWith1) {
  const Outcome outcome = inspect("no/such.flashpack 2>&1");
  EXPECT_EQ(outcome.status, 1);
  EXPECT_EQ(outcome.output, "flashpack_inspect: open no/such.flashpack: No such file or directory\n");
}

TEST(Inspect, WrongUsageExitsWith2) {
  EXPECT_EQ(inspect("2>&1").status, 2);
  EXPECT_EQ(inspect("--yaml " + quoted(golden("v3_bool")) + " 2>&1").status, 2);
}

TEST(Inspect, HelpExplainsExitStatus) {
  const Outcome outcome = inspect("--help");
  EXPECT_EQ(outcome.status, 0);
  EXPECT_NE(outcome.output.find("Exit status: 0"), std::string::npos);
}

TEST(Inspect, PipeThatNobodyReadsIsNoFailure) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  ::close(ends[0]);
  const Outcome outcome = inspect(quoted(golden("v3_bool")) + " 2>&1 >&" + std::to_string(ends[1]));
  ::close(ends[1]);
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.output, "");
}

TEST(Inspect, FullDiskIsAFailure) {
  const Outcome outcome = inspect(quoted(golden("v3_bool")) + " 2>&1 >/dev/full");
  EXPECT_EQ(outcome.status, 1);
  EXPECT_NE(outcome.output.find("No space left on device"), std::string::npos) << outcome.output;
}

TEST(Inspect, VerifyTellsSoundFromCorruptAndNamesTheTensors) {
  const Scratch file("");
  const Metadata layout = make_layout(std::vector<TensorSpec>{{"a", DType::kUInt8, {2'000'000}}}, 0);
  const std::vector<std::byte> bytes(layout.payload_bytes, std::byte{5});
  {
    Engine engine;
    FileWriter writer = engine.create(file.path(), {.checksums = true});
    writer.write({.extents = {{.size_bytes = bytes.size(), .source = bytes.data()}}});
    Metadata metadata = layout;
    metadata.checksums = writer.checksums();
    const std::string footer = encode_footer(metadata);
    writer.commit(std::as_bytes(std::span(footer)));
  }
  const Outcome sound = inspect("--verify " + quoted(file.path()));
  EXPECT_EQ(sound.status, 0);
  EXPECT_TRUE(sound.output.starts_with("sound: 2.00 MB")) << sound.output;
  std::fstream(file.path(), std::ios::in | std::ios::out).seekp(1'500'000).put('x');
  const Outcome corrupt = inspect("--verify " + quoted(file.path()));
  EXPECT_EQ(corrupt.status, 1);
  EXPECT_NE(corrupt.output.find("corrupt: bytes 1048576+951424, of \"a\""), std::string::npos) << corrupt.output;
  const Outcome json = inspect("--verify --json " + quoted(file.path()));
  EXPECT_EQ(json.status, 1);
  EXPECT_EQ(boost::json::parse(json.output).at("corrupt").as_array().size(), 1u);
}

TEST(Inspect, VerifyOfAFileWithoutChecksumsSaysSo) {
  const Outcome outcome = inspect("--verify " + quoted(golden("v3_bf16")) + " 2>&1");
  EXPECT_EQ(outcome.status, 1);
  EXPECT_NE(outcome.output.find("no checksums to verify"), std::string::npos) << outcome.output;
}

}  // namespace
}  // namespace flashpack
