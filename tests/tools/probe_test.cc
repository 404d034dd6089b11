#include <gtest/gtest.h>

#include <boost/json/parse.hpp>
#include <filesystem>

#include "engine/tuning/keep_profile.h"
#include "tests/support/gpu_shown.h"
#include "tests/support/run.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

testing::Outcome probe(const std::string& arguments) { return testing::run("'" FLASHPACK_PROBE "' " + arguments); }

TEST(ProbeTool, TextAndJsonTellOfTheSameThings) {
  const testing::Outcome text = probe("/var/tmp");
  const testing::Outcome json = probe("/var/tmp --json");
  ASSERT_EQ(text.status, 0) << text.output;
  ASSERT_EQ(json.status, 0) << json.output;
  const auto report = boost::json::parse(json.output).as_object();
  std::size_t limits = 0;
  for (const auto& [key, finding] : report) {
    EXPECT_NE(text.output.find("\n" + std::string(key) + " "), key == "kernel" ? 0 : std::string::npos) << key;
    for (const char* part : {"value", "limit", "cure"}) EXPECT_TRUE(finding.at(part).is_string()) << key;
    limits += !finding.at("limit").as_string().empty();
  }
  EXPECT_TRUE(report.contains("io_uring") && report.contains("direct_io"));
  const std::string told = limits == 0 ? "no limits" : std::to_string(limits) + (limits == 1 ? " limit" : " limits");
  EXPECT_TRUE(text.output.ends_with(told + "\n")) << text.output;
}

TEST(ProbeTool, OutputThatIsLostIsAFailure) {
  for (const char* form : {"", "--json "}) {
    const testing::Outcome outcome = probe(std::string(form) + "/var/tmp 2>&1 >/dev/full");
    EXPECT_EQ(outcome.status, 1);
    EXPECT_NE(outcome.output.find("No space left on device"), std::string::npos) << outcome.output;
  }
}

TEST(ProbeTool, AProfileIsToldAndWhyThereIsNone) {
  const testing::TempDir dir;
  const auto profile = [&] {
    const auto outcome = testing::run("XDG_CONFIG_HOME='" + dir.path().string() + "' '" FLASHPACK_PROBE "' --json '" +
                                      dir.path().string() + "'");
    return std::string(boost::json::parse(outcome.output).at("profile").at("value").as_string());
  };
  EXPECT_TRUE(profile().starts_with("none applies: there is no ")) << profile();
  EngineOptions options;
  options.queue_depth = 31;
  try {
    internal::keep_profile(dir.path(), options, dir / "flashpack/tune.json");
  } catch (const Error& error) {
    GTEST_SKIP() << error.what();
  }
  EXPECT_TRUE(profile().starts_with("4 MiB x 31 of ")) << profile();
}

TEST(ProbeTool, TheProfileOfTheGpusIsToldBesideThatOfTheHostAndAStaleOneWithTheReasonAndTheFile) {
  const testing::TempDir dir;
  const std::filesystem::path file = dir / "flashpack/tune.json";
  const int status = testing::run_in_child([&] {
    if (!testing::show_gpu("NVIDIA Of The Tests")) return testing::kSkip;
    EngineOptions options;
    options.device.kind = Device::Kind::kCuda;
    options.queue_depth = 31;
    try {
      internal::keep_profile(dir.path(), options, file);
    } catch (const Error&) {
      return testing::kSkip;
    }
    const auto outcome = testing::run("XDG_CONFIG_HOME='" + dir.path().string() + "' '" FLASHPACK_PROBE "' --json '" +
                                      dir.path().string() + "'");
    const auto report = boost::json::parse(outcome.output).as_object();
    const bool told =
        report.at("profile_gpu").at("value").as_string() == "NVIDIA Of The Tests: 4 MiB x 31 of " + file.string();
    return told && !report.contains("profiles_ignored") ? 0 : 1;
  });
  if (status == testing::kSkip) GTEST_SKIP() << "no mount namespace, or no disk that could be recognised";
  EXPECT_EQ(status, 0);
  // Out here there is no such GPU.
  const auto outcome =
      testing::run("XDG_CONFIG_HOME='" + dir.path().string() + "' '" FLASHPACK_PROBE "' '" + dir.path().string() + "'");
  EXPECT_NE(outcome.output.find("in " + file.string() + ": 4 MiB x 31 for gpu \"NVIDIA Of The Tests\", and here"),
            std::string::npos)
      << outcome.output;
}

TEST(ProbeTool, APathThatIsNotThereAndAWrongFlagHaveStatusesOfTheirOwn) {
  const testing::Outcome missing = probe("/no/such/path 2>&1");
  EXPECT_EQ(missing.status, 1);
  EXPECT_NE(missing.output.find("/no/such/path"), std::string::npos) << missing.output;
  EXPECT_EQ(probe("--wrong 2>&1").status, 2);
  EXPECT_EQ(probe("--help").status, 0);
}

}  // namespace
}  // namespace flashpack
