#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <boost/json/parse.hpp>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "flashpack/tuning.h"
#include "tests/support/hanging_fs.h"
#include "tests/support/lies_in_memory.h"
#include "tests/support/mounts.h"
#include "tests/support/run.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

constexpr int kExitNotKept = 3;

bool has(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

testing::Outcome tune(const std::filesystem::path& path, const std::filesystem::path& config,
                      const std::string& more = "2>&1", const std::string& budget = "1s") {
  return testing::run("XDG_CONFIG_HOME='" + config.string() + "' '" FLASHPACK_TUNE "' --size_gib 0.02 --budget " +
                      budget + " '" + path.string() + "' " + more);
}

bool stays_in_page_cache(const testing::TempDir& dir) {
  testing::write_file(dir / "file", testing::random_bytes(4096));
  return testing::lies_in_memory(dir / "file");
}

void expect_the_rule_the_limits_and_one_choice(const std::string& output, const std::string& device = "{") {
  for (const std::string& part : {std::string("within 3 % of the fastest"), std::string("limit: "),
                                  "best: EngineOptions" + device + ".chunk_bytes = "})
    EXPECT_TRUE(has(output, part)) << output;
}

boost::json::value report_in(const std::filesystem::path& file) {
  const auto bytes = testing::read_file(file);
  return boost::json::parse({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
}

TEST(TuneTool, SizesThatNoFileHasAreRefused) {
  const testing::TempDir dir;
  for (const std::string size : {"nan", "inf", "1e30", "0", "-1"}) {
    const testing::Outcome outcome =
        testing::run("'" FLASHPACK_TUNE "' --size_gib=" + size + " '" + dir.path().string() + "' 2>&1");
    EXPECT_NE(outcome.status, 0) << size;
    EXPECT_TRUE(has(outcome.output, "--size_gib: must be more than 0 and at most")) << size << ": " << outcome.output;
  }
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(TuneTool, ABudgetThatNobodyWaitsForIsRefused) {
  const testing::TempDir dir;
  for (const std::string budget : {"1e300", "100000", "0", "-1"}) {
    const testing::Outcome outcome =
        testing::run("'" FLASHPACK_TUNE "' --budget=" + budget + " '" + dir.path().string() + "' 2>&1");
    EXPECT_EQ(outcome.status, 2) << budget;
    EXPECT_TRUE(has(outcome.output, "--budget: must be more than 0 s and at most a day")) << outcome.output;
  }
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(TuneTool, AnEmptyValueIsAnErrorAndDoesNotTakeWhatFollows) {
  const testing::TempDir dir;
  for (const std::string option : {"--device", "--budget", "--size_gib", "--json_file"}) {
    const testing::Outcome outcome =
        testing::run("cd '" + dir.path().string() + "' && '" FLASHPACK_TUNE "' " + option + "= cpu 2>&1");
    EXPECT_EQ(outcome.status, 2) << outcome.output;
    EXPECT_TRUE(has(outcome.output, option + ": has an empty value")) << outcome.output;
  }
  const testing::Outcome apart = testing::run("'" FLASHPACK_TUNE "' --device '' '" + dir.path().string() + "' 2>&1");
  EXPECT_EQ(apart.status, 2) << apart.output;
  EXPECT_TRUE(has(apart.output, "\"\" is no device")) << apart.output;
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(TuneTool, WhatIsBestForADiskIsKeptAndAppliedFromThenOn) {
  const testing::TempDir dir;
  if (stays_in_page_cache(dir)) GTEST_SKIP() << "this file system keeps its pages";
  const testing::Outcome outcome = tune(dir / "file", dir / "config");
  expect_the_rule_the_limits_and_one_choice(outcome.output);
  EXPECT_TRUE(has(outcome.output, "compared with")) << outcome.output;
  if (outcome.status == kExitNotKept) GTEST_SKIP() << outcome.output;
  EXPECT_EQ(outcome.status, 0) << outcome.output;
  const auto profiles = dir / "config/flashpack/tune.json";
  EXPECT_TRUE(has(outcome.output, "kept in " + profiles.string())) << outcome.output;
  const TunedOptions tuned = tuned_options(dir.path(), {}, profiles);
  EXPECT_EQ(tuned.applied, !has(outcome.output, "}   the default\n")) << tuned.reason;
  EXPECT_TRUE(tuned.applied || has(tuned.reason, "nothing was better than the defaults")) << tuned.reason;
  using Entries = std::filesystem::directory_iterator;
  EXPECT_EQ(std::distance(Entries(dir.path()), Entries()), 2) << "the generated file is still there";
}

TEST(TuneTool, ADryRunKeepsNothingAndJsonTellsAllThatWasMeasured) {
  const testing::TempDir dir;
  const testing::Outcome outcome = tune(dir.path(), dir / "config", "--dry_run --json 2>/dev/null");
  EXPECT_EQ(outcome.status, 0) << outcome.output;
  EXPECT_FALSE(std::filesystem::exists(dir / "config"));
  const auto report = boost::json::parse(outcome.output);
  EXPECT_EQ(report.at("not_kept").as_string(), "--dry_run");
  EXPECT_EQ(report.at("directory").as_string(), dir.path().string());
  EXPECT_TRUE(report.at("best").at("chunk_bytes").is_int64());
  EXPECT_GT(report.at("page_cache").at(0).at("gb_per_s").to_number<double>(), 0);
}

TEST(TuneTool, LoadsCompareChecksumsIfAskedFor) {
  const testing::TempDir dir;
  for (const bool verify : {false, true}) {
    const testing::Outcome outcome = tune(
        dir.path(), dir / "config", std::string("--dry_run --json ") + (verify ? "--verify" : "") + " 2>/dev/null");
    EXPECT_EQ(outcome.status, 0) << outcome.output;
    EXPECT_EQ(boost::json::parse(outcome.output).at("verified_bytes").to_number<double>() > 0, verify)
        << outcome.output;
  }
}

// A large file is still being written when the signal comes, and has another name then.
class TuneToolEnded : public ::testing::TestWithParam<const char*> {};

TEST_P(TuneToolEnded, ASignalThatEndsItRemovesItsFiles) {
  const std::string size_gib = GetParam();
  const testing::TempDir dir;
  const std::string here = "'" + dir.path().string() + "'";
  const testing::Outcome outcome =
      testing::run("'" FLASHPACK_TUNE "' --size_gib " + size_gib + " --budget 600s " + here + " >" + here +
                   "/log 2>&1 & until ls -A " + here +
                   " | grep -q flashpack_tune; do kill -0 $! || exit 9; done; kill -TERM $!; wait $!");
  EXPECT_EQ(outcome.status, 128 + SIGTERM) << outcome.output;
  EXPECT_TRUE(std::filesystem::remove(dir / "log"));
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}
INSTANTIATE_TEST_SUITE_P(Sizes, TuneToolEnded, ::testing::Values("0.02", "0.5"),
                         [](const auto& size) { return size.index == 0 ? "Small" : "Large"; });

TEST(TuneTool, AReaderOfItsOutputThatEndsEarlyLeavesNoFiles) {
  const testing::TempDir dir;
  const testing::Outcome outcome = testing::run("'" FLASHPACK_TUNE "' --size_gib 0.02 --budget 1s --dry_run '" +
                                                dir.path().string() + "' 2>&1 | head -n 1");
  EXPECT_EQ(outcome.status, 0) << outcome.output;
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(TuneTool, ChunksAndDepthsAreAMapAndRequestsHaveLatencies) {
  const testing::TempDir dir;
  if (stays_in_page_cache(dir)) GTEST_SKIP() << "this file system keeps its pages";
  const testing::Outcome outcome = tune(dir.path(), dir / "config", "--dry_run 2>/dev/null");
  for (const char* part : {"disk, GB/s\n  chunk, depth ", "\n         4 MiB ", "% of the fastest", "*"})
    EXPECT_TRUE(has(outcome.output, part)) << outcome.output;
  EXPECT_FALSE(has(outcome.output, "\033")) << "this is no terminal";
  if (has(outcome.output, "requests could not be timed")) GTEST_SKIP() << outcome.output;
  EXPECT_TRUE(has(outcome.output, "ms p50 / p95 / p99")) << outcome.output;
}

TEST(TuneTool, TheDiskIsNamedAsTheLimitBesideWhatItsPlainReadsReach) {
  const testing::TempDir dir;
  if (stays_in_page_cache(dir)) GTEST_SKIP() << "this file system keeps its pages";
  const testing::Outcome outcome = tune(dir.path(), dir / "config", "--dry_run --json 2>/dev/null");
  ASSERT_EQ(outcome.status, 0) << outcome.output;
  const auto report = boost::json::parse(outcome.output);
  EXPECT_GT(report.at("disk_plain_gb_per_s").to_number<double>(), 0);
  const std::string limit(report.at("disk_limit").as_string());
  EXPECT_TRUE(limit.starts_with("CPU: ") || has(limit, "plain reads reach")) << limit;
}

TEST(TuneTool, WritesAreMeasuredIfAskedForAndTheJsonGoesToAFileToo) {
  const testing::TempDir dir;
  if (stays_in_page_cache(dir)) GTEST_SKIP() << "this file system keeps its pages";
  const auto file = dir / "report.json";
  const testing::Outcome outcome =
      tune(dir.path(), dir / "config", "--writes --dry_run --json_file '" + file.string() + "' 2>/dev/null");
  EXPECT_EQ(outcome.status, 0) << outcome.output;
  for (const char* part : {"durable writes, GB/s", "Writes are only shown"})
    EXPECT_TRUE(has(outcome.output, part)) << outcome.output;
  const auto report = report_in(file);
  for (const char* table : {"disk", "page_cache", "writes"})
    EXPECT_GT(report.at(table).at(0).at("gb_per_s").to_number<double>(), 0) << table;
  EXPECT_EQ(report.at("writes").at(0).at("queue_depth"), report.at("default").at("queue_depth"));
  const std::string limit(report.at("writes_limit").as_string());
  const bool known = report.at("writes_plain_gb_per_s").to_number<double>() > 0;
  EXPECT_TRUE(limit.starts_with("CPU: ") || has(limit, known ? "plain writes reach" : "not known")) << limit;
  if (report.at("no_latency").as_string().empty()) {
    const auto& latency = report.at("disk").at(0).at("latency_s");
    EXPECT_GT(latency.at("p50").to_number<double>(), 0);
    EXPECT_GE(latency.at("p99").to_number<double>(), latency.at("p50").to_number<double>());
  }
  using Entries = std::filesystem::directory_iterator;
  EXPECT_EQ(std::distance(Entries(dir.path()), Entries()), 2) << "a file that was read or written is still there";
}

// The backends of the settings in a table.
std::set<std::string> backends_in(const boost::json::value& report, const char* table) {
  std::set<std::string> all;
  for (const auto& cell : report.at(table).as_array()) all.emplace(cell.at("backend").as_string());
  return all;
}

TEST(TuneTool, BackendsAndPoliciesAreComparedIfAskedFor) {
  const testing::TempDir dir;
  if (stays_in_page_cache(dir)) GTEST_SKIP() << "this file system keeps its pages";
  // The first round has to find its time on a busy machine, too.
  const auto report_of = [&](const std::string& flags) {
    const testing::Outcome outcome = tune(dir.path(), dir / "config", "--dry_run --json 2>/dev/null " + flags, "5s");
    EXPECT_EQ(outcome.status, 0) << outcome.output;
    return boost::json::parse(outcome.output);
  };
  const auto plain = report_of("");
  EXPECT_EQ(backends_in(plain, "disk"), std::set<std::string>{"auto"});
  EXPECT_TRUE(plain.at("policies_cold").as_array().empty());
  const auto asked = report_of("--backend --policy");
  if (asked.at("no_backend").as_string().empty()) {
    EXPECT_EQ(backends_in(asked, "disk"), (std::set<std::string>{"auto", "workers"}));
  }
  for (const char* table : {"policies_cold", "policies_cached"}) {
    std::set<std::string> policies;
    for (const auto& cell : asked.at(table).as_array()) {
      EXPECT_GT(cell.at("gb_per_s").to_number<double>(), 0);
      policies.emplace(cell.at("policy").as_string());
    }
    EXPECT_EQ(policies, (std::set<std::string>{"auto", "direct", "buffered"})) << table;
  }
}

TEST(TuneTool, WhereOnlyTheWorkersAreAllowedThatIsSaidAndTheirNumberIsSearchedInPlaceOfBackends) {
  const testing::TempDir dir;
  if (stays_in_page_cache(dir)) GTEST_SKIP() << "this file system keeps its pages";
  const int status = testing::run_in_child([&] {
    if (!testing::deny_syscall(SYS_io_uring_setup, EPERM)) return testing::kSkip;
    const testing::Outcome outcome = tune(dir.path(), dir / "config", "--dry_run --json --backend 2>/dev/null", "4s");
    const auto report = boost::json::parse(outcome.output);
    const bool said = has(std::string(report.at("no_backend").as_string()), "only the workers are there: ");
    // A search of depths would have those below the default's; how many cells there are depends on the machine's speed.
    const auto& cells = report.at("disk").as_array();
    const auto depth_of = [](const boost::json::value& cell) { return cell.at("queue_depth").as_int64(); };
    const bool by_workers = cells.size() > 1 && std::ranges::all_of(cells, [&](const boost::json::value& cell) {
                              return depth_of(cell) == std::max(depth_of(cells.front()), cell.at("workers").as_int64());
                            });
    return said && by_workers && backends_in(report, "disk") == std::set<std::string>{"auto"} ? 0 : 1;
  });
  if (status == testing::kSkip) GTEST_SKIP() << "io_uring cannot be refused here";
  EXPECT_EQ(status, 0);
}

TEST(TuneTool, PoliciesAreShownForBothStatesOfThePageCacheAndNotKept) {
  const testing::TempDir dir;
  if (stays_in_page_cache(dir)) GTEST_SKIP() << "this file system keeps its pages";
  const testing::Outcome outcome = tune(dir.path(), dir / "config", "--policy 2>/dev/null");
  for (const char* part : {"nothing cached  auto ", "nothing cached  direct ", "all cached      buffered ",
                           "Policies are only shown", "policy of loads with "})
    EXPECT_TRUE(has(outcome.output, part)) << part << outcome.output;
  if (outcome.status == kExitNotKept) GTEST_SKIP() << outcome.output;
  const auto profile = report_in(dir / "config/flashpack/tune.json").at("profiles").at(0).as_object();
  for (const auto& [name, value] : profile) EXPECT_FALSE(has(name, "polic") || has(name, "cache")) << name;
}

TEST(TuneTool, WhereAllIsPageCacheWhatCannotBeMeasuredIsSaidAndNothingIsKept) {
  const testing::TempDir config;
  const std::filesystem::path dir = "/dev/shm/tune_test." + std::to_string(::getpid());
  std::error_code error;
  if (!std::filesystem::create_directory(dir, error)) GTEST_SKIP() << "no " << dir << ": " << error.message();
  const testing::Outcome outcome = tune(dir, config.path());
  EXPECT_TRUE(std::filesystem::is_empty(dir));
  std::filesystem::remove_all(dir);
  EXPECT_EQ(outcome.status, kExitNotKept);
  expect_the_rule_the_limits_and_one_choice(outcome.output);
  EXPECT_TRUE(has(outcome.output, "reads from a disk cannot be measured here")) << outcome.output;
  EXPECT_TRUE(has(outcome.output, "not kept: ") && has(outcome.output, "tmpfs has no disk")) << outcome.output;
  EXPECT_TRUE(outcome.output.starts_with("flashpack_tune: no profile will be kept: tmpfs has no disk"))
      << outcome.output;
  EXPECT_TRUE(std::filesystem::is_empty(config.path()));
}

#ifdef FLASHPACK_HANGING_FS
TEST(TuneTool, WhereNothingStaysInThePageCacheTheDiskIsMeasuredAlone) {
  const testing::TempDir dir;
  const testing::HangingFs fs(FLASHPACK_HANGING_FS, dir / "mount");
  if (!fs.mounted()) GTEST_SKIP() << "FUSE cannot be mounted here";
  const testing::Outcome outcome =
      tune(dir / "mount", dir / "config", "--policy --json_file '" + (dir / "report").string() + "' 2>&1");
  EXPECT_TRUE(has(outcome.output, "do not stay in the page cache: loads from it cannot be measured here"))
      << outcome.output;
  const boost::json::value report = report_in(dir / "report");
  EXPECT_FALSE(report.at("disk").as_array().empty());
  EXPECT_FALSE(report.at("policies_cold").as_array().empty());
  for (const char* none : {"page_cache", "policies_cached"}) EXPECT_TRUE(report.at(none).as_array().empty()) << none;
  EXPECT_EQ(report.at("no_page_cache").as_string(), "the file system keeps nothing there");
  for (const auto& turns : report.at("turns").as_array()) EXPECT_EQ(turns.as_object().count("page_cache"), 0U);
  EXPECT_TRUE(outcome.status == 0 || outcome.status == kExitNotKept) << outcome.output;
}
#endif

// A disk of `mib` MiB in a file, mounted at `at` as long as this lives. Not mounted, with the reason, where that is not
// allowed.
class SmallDisk {
 public:
  SmallDisk(const std::filesystem::path& image, int mib, const std::filesystem::path& at) : at_(at) {
    std::filesystem::create_directory(at);
    made_ = testing::run("truncate -s " + std::to_string(mib) + "M '" + image.string() +
                         "' && mkfs.ext4 -q -m 0 -O ^has_journal '" + image.string() + "' 2>&1 && mount -o loop '" +
                         image.string() + "' '" + at.string() + "' 2>&1");
  }
  ~SmallDisk() {
    if (made_.status == 0) ::umount2(at_.c_str(), MNT_DETACH);
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;

  bool mounted() const { return made_.status == 0; }
  const std::string& refusal() const { return made_.output; }

 private:
  std::filesystem::path at_;
  testing::Outcome made_;
};

TEST(TuneTool, WritesThatFindTooLittleSpaceDoNotCostWhatWasDecidedBefore) {
  const testing::TempDir dir;
  const SmallDisk disk(dir / "image", 32, dir / "mount");
  if (!disk.mounted()) GTEST_SKIP() << disk.refusal();
  const testing::Outcome outcome =
      tune(dir / "mount", dir / "config", "--writes --json_file '" + (dir / "report").string() + "' 2>&1");
  EXPECT_TRUE(outcome.status == 0 || outcome.status == kExitNotKept) << outcome.output;
  expect_the_rule_the_limits_and_one_choice(outcome.output);
  EXPECT_TRUE(has(outcome.output, "durable writes could not be measured: ")) << outcome.output;
  const boost::json::value report = report_in(dir / "report");
  EXPECT_TRUE(has(std::string(report.at("no_writes").as_string()), "No space left")) << report.at("no_writes");
  EXPECT_TRUE(report.at("writes").as_array().empty());
  EXPECT_FALSE(report.at("disk").as_array().empty());
}

TEST(TuneTool, OnANetworkFileSystemItIsSaidWhatCannotBeTold) {
  const testing::TempDir dir;
  const testing::Mount mount("tmpfs", "host:/x", dir / "mount", 0, "");
  if (!mount.refusal().empty()) GTEST_SKIP() << mount.refusal();
  const testing::Outcome outcome =
      tune(dir / "mount", dir / "config", "--json_file '" + (dir / "report").string() + "' 2>&1");
  EXPECT_TRUE(has(outcome.output, "is on the network file system of host:/x: whether a read past the page cache"))
      << outcome.output;
  EXPECT_EQ(report_in(dir / "report").at("server").as_string(), "host:/x");
  EXPECT_EQ(outcome.status, 0) << outcome.output;
}

TEST(TuneTool, WithoutAPlaceToWriteTheResultIsPrintedWithAStatusOfItsOwn) {
  const testing::TempDir dir;
  testing::write_file(dir / "blocked", {});
  const testing::Outcome outcome = tune(dir.path(), dir / "blocked");
  EXPECT_EQ(outcome.status, kExitNotKept);
  expect_the_rule_the_limits_and_one_choice(outcome.output);
  EXPECT_TRUE(has(outcome.output, "not kept: ")) << outcome.output;
  EXPECT_TRUE(outcome.output.starts_with("flashpack_tune: no profile will be kept: ")) << outcome.output;
  EXPECT_FALSE(has(tune(dir.path(), dir / "blocked", "--dry_run 2>&1").output, "no profile will be kept"));
}

TEST(TuneTool, AGpuThatIsNotThereIsToldBeforeAnythingIsMade) {
  const testing::TempDir dir;
  for (const char* device : {"cuda:99", "cuda:12345"}) {
    const testing::Outcome outcome = tune(dir.path(), dir / "config", "--device " + std::string(device) + " 2>&1");
    EXPECT_EQ(outcome.status, 1) << outcome.output;
    EXPECT_TRUE(has(outcome.output, std::string(device) + ": ") && has(outcome.output, "CUDA")) << outcome.output;
    EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
  }
}

#ifdef FLASHPACK_TUNE_REHEARSAL

// Where loads go to the memory of the tests' own CUDA runtime, and the driver in /proc tells of a GPU.
testing::Outcome tune_gpu(const std::filesystem::path& path, const std::filesystem::path& config,
                          const std::string& more) {
  const std::string tool =
      "'" FLASHPACK_TUNE_REHEARSAL "' --size_gib 0.02 --device cuda:1 '" + path.string() + "' " + more;
  return testing::run("XDG_CONFIG_HOME='" + config.string() + "' unshare --mount sh -c '" +
                      R"(mount -t tmpfs none /proc/driver || exit 77
                      mkdir -p /proc/driver/nvidia/gpus/0
                      echo Model: GPU of the tests >/proc/driver/nvidia/gpus/0/information
                      exec "$@")" +
                      "' sh " + tool);
}

TEST(TuneTool, WhatIsBestForAGpuIsKeptForThatGpuAlone) {
  const testing::TempDir dir;
  const testing::Outcome outcome =
      tune_gpu(dir.path(), dir / "config", "--budget 1s --json_file '" + (dir / "report").string() + "' 2>&1");
  if (outcome.status == 77) GTEST_SKIP() << "no mount namespace: " << outcome.output;
  expect_the_rule_the_limits_and_one_choice(outcome.output, "{.device = {Device::Kind::kCuda, 1}, ");
  for (const char* part : {"link to cuda:1: ", "page cache, GB/s\nchunk, staging "})
    EXPECT_TRUE(has(outcome.output, part)) << outcome.output;
  if (outcome.status == kExitNotKept) GTEST_SKIP() << outcome.output;
  ASSERT_EQ(outcome.status, 0) << outcome.output;
  const auto profiles = dir / "config/flashpack/tune.json";
  const auto profile = report_in(profiles).at("profiles").at(0).as_object();
  EXPECT_EQ(profile.at("gpu").as_string(), "GPU of the tests");
  const auto report = report_in(dir / "report");
  ASSERT_EQ(profile.contains("defaults"), report.at("is_default").as_bool());
  for (const auto& [name, value] : report.at("best").as_object()) {
    const auto* const kept = profile.if_contains(name);
    EXPECT_TRUE(kept == nullptr || *kept == value) << outcome.output;
  }
  EXPECT_FALSE(tuned_options(dir.path(), {}, profiles).applied);
}

TEST(TuneTool, BackendsAndPoliciesOfLoadsToAGpuAreComparedToo) {
  const testing::TempDir dir;
  if (stays_in_page_cache(dir)) GTEST_SKIP() << "this file system keeps its pages";
  const testing::Outcome outcome =
      tune_gpu(dir.path(), dir / "config", "--backend --policy --budget 15s --dry_run --json 2>/dev/null");
  if (outcome.status == 77) GTEST_SKIP() << "no mount namespace: " << outcome.output;
  ASSERT_EQ(outcome.status, 0) << outcome.output;
  const auto report = boost::json::parse(outcome.output);
  if (report.at("no_backend").as_string().empty()) {
    EXPECT_EQ(backends_in(report, "disk"), (std::set<std::string>{"auto", "workers"}));
  }
  for (const char* table : {"policies_cold", "policies_cached"}) EXPECT_EQ(report.at(table).as_array().size(), 3U);
}

// Where there is no disk, all of the time is for the page cache, and it is far more than the first round takes.
TEST(TuneTool, LoadsToAGpuAreMeasuredWithChunksAndStagingMemoryBesideTheLink) {
  const std::filesystem::path dir = "/dev/shm/tune_test." + std::to_string(::getpid());
  std::error_code error;
  if (!std::filesystem::create_directory(dir, error)) GTEST_SKIP() << "no " << dir << ": " << error.message();
  const testing::Outcome outcome = tune_gpu(dir, dir, "--dry_run --budget 60s --json 2>/dev/null");
  std::filesystem::remove_all(dir);
  if (outcome.status == 77) GTEST_SKIP() << "no mount namespace: " << outcome.output;
  ASSERT_EQ(outcome.status, 0) << outcome.output;
  const auto report = boost::json::parse(outcome.output);
  EXPECT_EQ(report.at("device").as_string(), "cuda:1");
  EXPECT_GT(report.at("link_gb_per_s").to_number<double>(), 0);
  std::set<std::pair<std::int64_t, std::int64_t>> slots;
  for (const auto& cell : report.at("page_cache").as_array())
    slots.emplace(cell.at("chunk_bytes").as_int64() >> 20, cell.at("staging_bytes").as_int64() >> 20);
  for (const std::int64_t chunk_mib : {1, 2, 4}) {
    for (const std::int64_t staging_mib : {16, 32, 96})
      EXPECT_EQ(slots.count({chunk_mib, staging_mib}), 1U) << chunk_mib << " " << staging_mib;
  }
}

#endif

TEST(TuneTool, ADirectoryThatIsNotThereAndWrongUsageHaveStatusesOfTheirOwn) {
  const testing::TempDir config;
  const testing::Outcome missing = tune("/no/such/directory", config.path());
  EXPECT_EQ(missing.status, 1);
  EXPECT_TRUE(has(missing.output, "/no/such/directory")) << missing.output;
  for (const char* wrong : {"--budget 0", "--budget -1s", "--budget long", "--size_gib 0", "--wrong"})
    EXPECT_EQ(tune(config.path(), config.path(), std::string(wrong) + " 2>&1").status, 2) << wrong;
  EXPECT_EQ(tune(config.path(), config.path(), "--help").status, 0);
}

}  // namespace
}  // namespace flashpack
