#include "flashpack/trace.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <malloc.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <boost/json/parse.hpp>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/ground/unique_fd.h"
#include "flashpack/engine.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"
#include "tests/support/trace_recorder.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

namespace json = boost::json;
using testing::GuardedMemory;
using testing::kMiB;

constexpr std::size_t kSlotPhase = 77;  // Memory that is not read in place.

std::uint64_t bytes_of(const std::vector<TraceEvent>& events) {
  std::uint64_t sum = 0;
  for (const TraceEvent& event : events) sum += event.size_bytes;
  return sum;
}

std::size_t allocated_bytes_now() {
  const struct mallinfo2 info = ::mallinfo2();
  return info.uordblks + info.hblkhd;
}

class TraceTest : public ::testing::Test {
 protected:
  TraceTest() { testing::write_file(path_, bytes_); }

  static EngineOptions options(TraceSink& sink) {
    return {.chunk_bytes = kMiB, .staging_bytes = 4 * kMiB, .workers = 2, .trace = &sink};
  }
  LoadRequest request(GuardedMemory& memory, CachePolicy cache) const {
    return {.files = {{.path = path_, .extents = {{0, memory.size(), memory.data()}}}}, .cache = cache};
  }
  /// A load through slots and one of no bytes that can be had, from a file with a strange name.
  void load_with(TraceSink& sink) {
    Engine engine(options(sink));
    GuardedMemory memory(bytes_.size(), kSlotPhase);
    engine.load(request(memory, CachePolicy::kDirect));
    EXPECT_THROW(engine.load({.files = {{.path = dir_ / "no\xff \"such\"\nfile"}}}), Error);
  }
  /// The events of a trace, of which the process may have been killed.
  static json::array events_in(std::string text) {
    if (!text.ends_with("]\n")) text += "]";
    return json::parse(text).as_array();
  }
  std::string text_of(const std::filesystem::path& path) const {
    const std::vector<std::byte> bytes = testing::read_file(path);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "file";
  std::vector<std::byte> bytes_ = testing::random_bytes(9 * kMiB + 1234);
};

TEST_F(TraceTest, EveryStageHasAName) {
  std::set<std::string> names;
  for (std::size_t stage = 0; stage < kTraceStages; ++stage) names.insert(to_string(static_cast<TraceStage>(stage)));
  EXPECT_EQ(names.size(), kTraceStages);
  EXPECT_FALSE(names.contains("unknown"));
}

TEST_F(TraceTest, BytesOfTheStepsAreThoseOfTheStatistics) {
  testing::TraceRecorder trace;
  Engine engine(options(trace));
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    const auto before = trace.events().size();
    GuardedMemory memory(bytes_.size(), kSlotPhase);
    const TransferStats stats = engine.load(request(memory, cache));
    EXPECT_GT(trace.events().size(), before);
    if (cache == CachePolicy::kDirect) {
      EXPECT_EQ(bytes_of(trace.of(TraceStage::kRead)), stats.direct_bytes);
      EXPECT_EQ(bytes_of(trace.of(TraceStage::kCopy)), bytes_.size());
    } else {
      EXPECT_EQ(bytes_of(trace.of(TraceStage::kReadCached)), stats.buffered_bytes);
    }
    FileWriter writer = engine.create(dir_ / "new");
    const TransferStats written = writer.write({.extents = {{0, memory.size(), memory.data()}}});
    EXPECT_EQ(bytes_of(trace.of(TraceStage::kWrite)) + bytes_of(trace.of(TraceStage::kWriteCached)),
              (cache == CachePolicy::kDirect ? 1 : 2) * (written.direct_bytes + written.buffered_bytes));
  }
}

TEST_F(TraceTest, StepsLieWithinTheirTransferAndDoNotOverlapInALane) {
  testing::TraceRecorder trace;
  load_with(trace);
  std::map<std::uint32_t, TraceEvent> last_in_lane;
  const std::vector<TraceEvent> transfers = trace.of(TraceStage::kTransfer);
  ASSERT_EQ(transfers.size(), 2u);
  for (const TraceEvent& event : trace.events()) {
    const TraceEvent& transfer = transfers.at(event.transfer - 1);
    EXPECT_LE(event.begin, event.end);
    EXPECT_GE(event.begin, transfer.begin);
    EXPECT_LE(event.end, transfer.end);
    if (event.stage >= TraceStage::kOpen) continue;
    const auto last = last_in_lane.find(event.lane);
    EXPECT_TRUE(last == last_in_lane.end() || event.begin >= last->second.end) << to_string(event.stage);
    last_in_lane[event.lane] = event;
    EXPECT_GE(event.depth, 1u);
  }
  EXPECT_EQ(trace.of(TraceStage::kOpen).size(), 2u);
  EXPECT_EQ(trace.of(TraceStage::kClose).size(), 1u);
}

TEST_F(TraceTest, ATransferIsToldWithItsBytesItsErrorAndItsFallbacks) {
  testing::TraceRecorder trace;
  load_with(trace);
  const std::vector<TraceEvent> transfers = trace.of(TraceStage::kTransfer);
  ASSERT_EQ(transfers.size(), 2u);
  EXPECT_EQ(transfers[0].size_bytes, bytes_.size());
  EXPECT_FALSE(transfers[0].error);
  EXPECT_EQ(transfers[1].size_bytes, 0u);
  EXPECT_EQ(transfers[1].error, std::errc::no_such_file_or_directory);
  Engine engine(options(trace));
  GuardedMemory memory(100);
  const TransferStats stats = engine.load({.files = {{.path = "/proc/self/maps"}}, .cache = CachePolicy::kDirect});
  EXPECT_NE(stats.fallback_reason, "");
  EXPECT_EQ(trace.notes().back(), stats.fallback_reason);
}

TEST_F(TraceTest, ASmallLoadOfAFileThatIsOpenAlreadyIsTold) {
  testing::TraceRecorder trace;
  Engine engine(options(trace));
  const testing::HeldInCache cached(path_);
  const FileHandle file = engine.open(path_);
  GuardedMemory memory(100);
  engine.load({.files = {{.extents = {{5, memory.size(), memory.data()}}, .handle = file}}});
  const std::vector<TraceEvent> transfers = trace.of(TraceStage::kTransfer);
  ASSERT_EQ(transfers.size(), 1u);
  EXPECT_EQ(transfers[0].size_bytes, memory.size());
  EXPECT_EQ(trace.paths().back(), path_.string());
}

TEST_F(TraceTest, EnginesHaveNumbersOfTheirOwn) {
  testing::TraceRecorder trace;
  load_with(trace);
  load_with(trace);
  EXPECT_NE(trace.events().front().engine, trace.events().back().engine);
}

TEST(TraceTotalsTest, TimesBytesAndDepthAreAddedUpForEachStageFileAndDevice) {
  TraceTotals totals;
  const TraceEvent::Time begin{};
  const auto event = [&](const char* path, std::uint64_t bytes, std::uint32_t depth) {
    totals.event({.stage = TraceStage::kRead,
                  .path = path,
                  .device = depth > 1 ? 2u : 0u,
                  .size_bytes = bytes,
                  .begin = begin,
                  .end = begin + std::chrono::milliseconds(250),
                  .depth = depth});
  };
  event("a", 10, 1);
  event("b", 20, 3);
  event("a", 5, 2);
  const TraceTotals::Total all = totals.totals()[static_cast<std::size_t>(TraceStage::kRead)];
  EXPECT_EQ(all.steps, 3u);
  EXPECT_EQ(all.bytes, 35u);
  EXPECT_DOUBLE_EQ(all.seconds, 0.75);
  EXPECT_EQ(all.depth, 3u);
  EXPECT_EQ(totals.totals_of_files().at("a")[static_cast<std::size_t>(TraceStage::kRead)].bytes, 15u);
  EXPECT_EQ(totals.totals_of_devices().at(0)[static_cast<std::size_t>(TraceStage::kRead)].bytes, 10u);
  EXPECT_EQ(totals.totals_of_devices().at(2)[static_cast<std::size_t>(TraceStage::kRead)].bytes, 25u);
  EXPECT_EQ(totals.totals()[static_cast<std::size_t>(TraceStage::kWrite)].steps, 0u);
}

TEST(TraceTotalsTest, AfterThousandsOfFilesTheRestIsAddedUp) {
  TraceTotals totals;
  for (std::size_t i = 0; i < TraceTotals::kMostFiles + 5; ++i)
    totals.event({.stage = TraceStage::kRead, .path = "/" + std::to_string(i), .size_bytes = 1});
  totals.event({.stage = TraceStage::kRead, .path = "/0", .size_bytes = 1});
  const auto files = totals.totals_of_files();
  constexpr auto kRead = static_cast<std::size_t>(TraceStage::kRead);
  EXPECT_EQ(files.size(), TraceTotals::kMostFiles + 1);
  EXPECT_EQ(files.at("")[kRead].bytes, 5u);
  EXPECT_EQ(files.at("/0")[kRead].bytes, 2u);
}

TEST(TraceTotalsTest, AForkedChildHasNoTotals) {
  TraceTotals totals;
  totals.event({.path = "a", .size_bytes = 1});
  const int status = testing::run_in_child([&] {
    totals.event({.path = "b"});
    const bool none = totals.totals_of_files().empty() && totals.totals_of_devices().empty();
    return totals.totals()[0].steps == 0 && none ? 0 : 1;
  });
  EXPECT_EQ(status, 0);
  EXPECT_EQ(totals.totals()[0].steps, 1u);
}

TEST_F(TraceTest, AChromeTraceIsJsonWhoseRowsHaveNamesAndNoOverlaps) {
  {
    ChromeTrace trace(dir_ / "trace.json");
    load_with(trace);
    EXPECT_FALSE(trace.error());
  }
  std::map<std::int64_t, double> end_of_row;
  std::map<std::string, std::int64_t> bytes;
  std::set<std::int64_t> named;
  for (const json::value& event : events_in(text_of(dir_ / "trace.json"))) {
    const std::int64_t row = event.at("tid").as_int64();
    if (event.at("ph").as_string() == "M") {
      if (event.at("name").as_string() == "thread_name") named.insert(row);
      continue;
    }
    EXPECT_EQ(event.at("ph").as_string(), "X");
    EXPECT_TRUE(named.contains(row));
    const double begin = event.at("ts").to_number<double>();
    EXPECT_GE(begin, end_of_row[row] - 0.001);
    end_of_row[row] = begin + event.at("dur").to_number<double>();
    EXPECT_EQ(event.at("args").at("device").as_int64(), 0);
    bytes[std::string(event.at("name").as_string())] += event.at("args").at("bytes").as_int64();
  }
  EXPECT_EQ(bytes["copy"], static_cast<std::int64_t>(bytes_.size()));
  EXPECT_EQ(bytes["transfer"], static_cast<std::int64_t>(bytes_.size()));
  EXPECT_GE(bytes["read"], bytes["copy"]);
  EXPECT_TRUE(bytes.contains("open") && bytes.contains("close"));
}

TEST_F(TraceTest, TransfersAndFilesThatOverlapGetRowsOfTheirOwn) {
  const TraceEvent::Time at{};
  const auto event = [&](TraceStage stage, int begin, int end) {
    return TraceEvent{
        .stage = stage, .engine = 1, .begin = at + std::chrono::seconds(begin), .end = at + std::chrono::seconds(end)};
  };
  {
    ChromeTrace trace(dir_ / "trace.json");
    for (const TraceStage stage : {TraceStage::kTransfer, TraceStage::kOpen}) {
      trace.event(event(stage, 0, 2));
      trace.event(event(stage, 1, 3));
      trace.event(event(stage, 2, 4));
    }
  }
  std::vector<std::int64_t> rows;
  for (const json::value& each : events_in(text_of(dir_ / "trace.json"))) {
    if (each.at("ph").as_string() == "X") rows.push_back(each.at("tid").as_int64());
  }
  ASSERT_EQ(rows.size(), 6u);
  for (const std::size_t first : {0u, 3u}) {
    EXPECT_NE(rows[first], rows[first + 1]);
    EXPECT_EQ(rows[first], rows[first + 2]) << "it begins when the first one ends";
  }
  EXPECT_NE(rows[0], rows[3]);
}

TEST_F(TraceTest, PathsNeedNotBeUtf8InAChromeTrace) {
  for (const auto& [path, expected] : std::vector<std::pair<std::string, std::string>>{
           {"pl\xc3\xa4in \xe2\x82\xac \xf0\x9f\x98\x80", "pl\xc3\xa4in \xe2\x82\xac \xf0\x9f\x98\x80"},
           {"a\"b\\c\nd\x01", "a\"b\\c\nd\x01"},
           {"\xff|\xc3|\xc0\xaf|\xed\xa0\x80|\xf5\x80\x80\x80",
            "\uFFFD|\uFFFD|\uFFFD\uFFFD|\uFFFD\uFFFD\uFFFD|\uFFFD\uFFFD\uFFFD\uFFFD"},
           {"cut \xe2\x82", "cut \uFFFD\uFFFD"}}) {
    {
      ChromeTrace trace(dir_ / "trace.json");
      trace.event({.path = path});
    }
    EXPECT_EQ(events_in(text_of(dir_ / "trace.json")).back().at("args").at("path").as_string(), expected);
  }
}

TEST_F(TraceTest, TheTraceOfAProcessThatWasKilledHasTheTransfersThatHadEnded) {
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ChromeTrace trace(dir_ / "trace.json");
    load_with(trace);
    ::_exit(0);
  }
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  const json::array events = events_in(text_of(dir_ / "trace.json"));
  EXPECT_EQ(events.back().at("name").as_string(), "transfer");
  EXPECT_EQ(events.back().at("args").at("error").as_string(), "No such file or directory");
}

TEST_F(TraceTest, AForkedChildWritesNothingToTheTraceOfItsParent) {
  std::string in_parent;
  {
    ChromeTrace trace(dir_ / "trace.json");
    trace.event({.path = "not written yet"});
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      trace.event({.stage = TraceStage::kTransfer});
      trace.~ChromeTrace();
      ::_exit(0);
    }
    ASSERT_EQ(::waitpid(child, nullptr, 0), child);
    in_parent = text_of(dir_ / "trace.json");
  }
  EXPECT_EQ(in_parent, "[");
  EXPECT_EQ(events_in(text_of(dir_ / "trace.json")).size(), 3u) << "two names and one event";
}

TEST_F(TraceTest, AForkedChildLeavesAloneWhatAThreadOfItsParentWasWriting) {
  constexpr std::size_t kPathBytes = 200'000;  // More than a pipe takes, and than malloc keeps for later.
  ASSERT_EQ(::mkfifo((dir_ / "trace.json").c_str(), 0600), 0);
  const internal::UniqueFd reader(::open((dir_ / "trace.json").c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
  ChromeTrace trace(dir_ / "trace.json");
  std::thread writer([&] { trace.event({.stage = TraceStage::kTransfer, .path = std::string(kPathBytes, 'x')}); });
  // Once the pipe has more than the first bracket, the thread is in the midst of writing.
  for (int waiting_bytes = 0; waiting_bytes <= 1; std::this_thread::yield())
    ASSERT_EQ(::ioctl(reader.get(), FIONREAD, &waiting_bytes), 0);
  const int status = testing::run_in_child([&] {
    ::alarm(static_cast<unsigned>(std::chrono::seconds(testing::kHang).count()));
    if (trace.error()) return 1;
    trace.flush();
    const std::size_t allocated_bytes = allocated_bytes_now();
    trace.~ChromeTrace();
    return allocated_bytes_now() == allocated_bytes ? 0 : 2;
  });
  EXPECT_EQ(status, 0);
  std::array<char, 4096> text{};
  std::size_t read_bytes = 0;
  while (read_bytes < kPathBytes) {
    const ssize_t result = ::read(reader.get(), text.data(), text.size());
    if (result > 0) read_bytes += static_cast<std::size_t>(result);
  }
  writer.join();
}

TEST_F(TraceTest, AFileThatAnotherTraceHasIsRefusedAndLeftAsItIs) {
  ChromeTrace first(dir_ / "trace.json");
  try {
    ChromeTrace second(dir_ / "trace.json");
    FAIL() << "two of them";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), std::errc::operation_would_block);
    EXPECT_EQ(error.path(), dir_ / "trace.json");
  }
  EXPECT_EQ(text_of(dir_ / "trace.json"), "[");
}

TEST_F(TraceTest, TheFileIsFreeAfterTheTraceEvenWhileAForkedChildLives) {
  auto first = std::make_unique<ChromeTrace>(dir_ / "trace.json");
  std::array<int, 2> life{};
  ASSERT_EQ(::pipe2(life.data(), O_CLOEXEC), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::close(life[1]);
    char byte = 0;
    ::_exit(static_cast<int>(::read(life[0], &byte, 1)));
  }
  first.reset();
  EXPECT_NO_THROW(ChromeTrace(dir_ / "trace.json"));
  ::close(life[0]);
  ::close(life[1]);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
}

TEST_F(TraceTest, AFifoWithoutAReaderIsAnErrorAndNoHang) {
  ASSERT_EQ(::mkfifo((dir_ / "trace.json").c_str(), 0600), 0);
  try {
    ChromeTrace trace(dir_ / "trace.json");
    FAIL() << "nobody reads it";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), std::errc::no_such_device_or_address);
  }
}

TEST_F(TraceTest, AFifoWhoseReaderHasGoneEndsTheTraceAndNotTheProgram) {
  ASSERT_EQ(::mkfifo((dir_ / "trace.json").c_str(), 0600), 0);
  const int status = testing::run_in_child([&] {
    ::signal(SIGPIPE, SIG_DFL);
    internal::UniqueFd reader(::open((dir_ / "trace.json").c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
    ChromeTrace trace(dir_ / "trace.json");
    reader.reset();
    trace.event({.stage = TraceStage::kTransfer});
    sigset_t pending;
    ::sigpending(&pending);
    return trace.error() == std::errc::broken_pipe && ::sigismember(&pending, SIGPIPE) == 0 ? 0 : 1;
  });
  EXPECT_EQ(status, 0);
}

TEST_F(TraceTest, AFullDiskEndsTheTraceAndNotTheLoad) {
  ChromeTrace trace("/dev/full");
  load_with(trace);
  EXPECT_EQ(trace.error(), std::errc::no_space_on_device);
}

}  // namespace
}  // namespace flashpack
