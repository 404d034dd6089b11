#include "flashpack/engine.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/sandbox.h"
#include "tests/support/sanitizers.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

using testing::GuardedMemory;
using testing::kMiB;
using testing::TempDir;

EngineOptions small_engine(Backend backend = Backend::kAuto) {
  return {.chunk_bytes = kMiB, .staging_bytes = 4 * kMiB, .workers = 2, .backend = backend};
}

template <class Call>
Error error_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "no Error was thrown";
  return Error(Errc::kUnusable, "none");
}

class EngineTest : public ::testing::TestWithParam<Backend> {
 protected:
  EngineTest() : bytes_(testing::random_bytes(5 * kMiB + 1234)), engine_(small_engine(GetParam())) {
    testing::write_file(path_, bytes_);
  }

  bool right(const GuardedMemory& memory, std::uint64_t offset) const {
    return memory.intact() && testing::same_bytes(memory.data(), bytes_.data() + offset, memory.size());
  }

  LoadRequest request(GuardedMemory& memory, std::uint64_t offset, CachePolicy cache = CachePolicy::kAuto) const {
    return {.files = {{.path = path_, .extents = {{offset, memory.size(), memory.data()}}}}, .cache = cache};
  }

  TempDir dir_;
  std::filesystem::path path_ = dir_ / "model";
  std::vector<std::byte> bytes_;
  Engine engine_;
};

INSTANTIATE_TEST_SUITE_P(Backends, EngineTest, ::testing::Values(Backend::kAuto, Backend::kWorkers),
                         [](const auto& backend) { return backend.param == Backend::kAuto ? "Auto" : "Workers"; });

TEST_P(EngineTest, EveryPolicyPhaseAndCacheStateGivesTheSameBytes) {
  for (const CachePolicy cache : {CachePolicy::kAuto, CachePolicy::kDirect, CachePolicy::kBuffered}) {
    for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{4095}, std::uint64_t{2 * kMiB + 7}}) {
      for (const std::size_t phase : {std::size_t{offset % 4096}, std::size_t{1}, std::size_t{512}}) {
        for (const bool cold : {true, false}) {
          if (cold) testing::drop_from_cache(path_);
          GuardedMemory memory(bytes_.size() - offset, phase);
          const TransferStats stats = engine_.load(request(memory, offset, cache));
          ASSERT_TRUE(right(memory, offset)) << "offset " << offset << " phase " << phase;
          EXPECT_EQ(stats.requested_bytes, memory.size());
          EXPECT_GE(stats.direct_bytes + stats.buffered_bytes, memory.size());
          if (cache == CachePolicy::kBuffered) {
            EXPECT_EQ(stats.direct_bytes, 0u);
          }
        }
      }
    }
  }
}

TEST_P(EngineTest, ManySmallTensorsWithGapsArriveInTheirPlaces) {
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    std::vector<std::unique_ptr<GuardedMemory>> memory;
    std::vector<std::uint64_t> offsets;
    FileExtents file{.path = path_};
    std::mt19937_64 random(3);
    for (std::uint64_t at = 0; at + 9000 < bytes_.size(); at += 1 + random() % 12'000) {
      offsets.push_back(at);
      memory.push_back(std::make_unique<GuardedMemory>(1 + random() % 8000, random()));
      file.extents.push_back({at, memory.back()->size(), memory.back()->data()});
    }
    std::shuffle(file.extents.begin(), file.extents.end(), random);
    engine_.load({.files = {file}, .cache = cache});
    for (std::size_t i = 0; i < memory.size(); ++i) ASSERT_TRUE(right(*memory[i], offsets[i]));
  }
}

TEST_P(EngineTest, SeveralFilesInOneRequest) {
  const auto other_bytes = testing::random_bytes(3 * kMiB + 5, 2);
  testing::write_file(dir_ / "other", other_bytes);
  GuardedMemory a(bytes_.size());
  GuardedMemory b(other_bytes.size());
  engine_.load({.files = {{.path = path_, .extents = {{0, a.size(), a.data()}}},
                          {.path = dir_ / "other", .extents = {{0, b.size(), b.data()}}}}});
  EXPECT_TRUE(right(a, 0));
  EXPECT_TRUE(b.intact());
  EXPECT_TRUE(testing::same_bytes(b.data(), other_bytes.data(), b.size()));
}

TEST_P(EngineTest, ExtentsMayOverlapInTheFile) {
  GuardedMemory a(2 * kMiB, 0);
  GuardedMemory b(2 * kMiB, 100);
  engine_.load({.files = {{.path = path_, .extents = {{0, a.size(), a.data()}, {100, b.size(), b.data()}}}}});
  EXPECT_TRUE(right(a, 0));
  EXPECT_TRUE(right(b, 100));
}

TEST_P(EngineTest, NothingToDoIsDoneAtOnce) {
  EXPECT_EQ(engine_.load({}).requested_bytes, 0u);
  EXPECT_EQ(engine_.load({.files = {{.path = path_, .extents = {{3, 0, nullptr}}}}}).requested_bytes, 0u);
}

TEST_P(EngineTest, ThreadsMayShareAnEngine) {
  std::vector<std::thread> threads;
  std::atomic<int> right_count = 0;
  for (unsigned i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (unsigned round = 0; round < 10; ++round) {
        const std::uint64_t offset = (i * 10 + round) * 9973 % kMiB;
        GuardedMemory memory(2 * kMiB, round % 2 ? offset : round);
        engine_.load(request(memory, offset, round % 3 ? CachePolicy::kAuto : CachePolicy::kDirect));
        right_count += right(memory, offset);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right_count, 40);
}

TEST_P(EngineTest, ManyEnginesMayLoadTheSameFileAtOnce) {
  std::vector<std::thread> threads;
  std::atomic<int> right_count = 0;
  for (unsigned i = 0; i < 6; ++i) {
    threads.emplace_back([&, i] {
      Engine engine(small_engine(GetParam()));
      for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kAuto, CachePolicy::kBuffered}) {
        GuardedMemory memory(bytes_.size(), i);
        engine.load(request(memory, 0, cache));
        right_count += right(memory, 0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right_count, 18);
}

TEST_P(EngineTest, MissingFileIsENOENTWithThePath) {
  const Error error = error_of([&] { engine_.load({.files = {{.path = dir_ / "none"}}}); });
  EXPECT_EQ(error.code(), std::errc::no_such_file_or_directory);
  EXPECT_EQ(error.path(), dir_ / "none");
  EXPECT_NE(std::string(error.what()).find("open " + (dir_ / "none").string()), std::string::npos) << error.what();
}

TEST_P(EngineTest, DirectoriesAndFifosAreErrorsNotHangs) {
  EXPECT_EQ(error_of([&] { engine_.load({.files = {{.path = dir_.path()}}}); }).code(), std::errc::is_a_directory);
  ASSERT_EQ(::mkfifo((dir_ / "fifo").c_str(), 0600), 0);
  EXPECT_EQ(error_of([&] { engine_.load({.files = {{.path = dir_ / "fifo"}}}); }).code(), Errc::kInvalidArgument);
}

TEST_P(EngineTest, ReadingPastTheEndFailsBeforeAnyIo) {
  GuardedMemory memory(1000);
  Transfer transfer = engine_.start_load(request(memory, bytes_.size() - 999));
  EXPECT_EQ(error_of([&] { transfer.wait(); }).code(), Errc::kTruncated);
  EXPECT_EQ(transfer.stats().operations, 0u);
}

TEST_P(EngineTest, AnotherFileThanTheMetadatasIsRefused) {
  struct stat status{};
  ASSERT_EQ(::stat(path_.c_str(), &status), 0);
  FileIdentity identity{.dev = status.st_dev,
                        .ino = status.st_ino,
                        .size_bytes = bytes_.size(),
                        .mtime_ns = status.st_mtim.tv_sec * 1'000'000'000L + status.st_mtim.tv_nsec};
  GuardedMemory memory(1000);
  LoadRequest wanted = request(memory, 0);
  wanted.files[0].expected = identity;
  engine_.load(wanted);
  testing::write_file(dir_ / "new", bytes_);
  std::filesystem::rename(dir_ / "new", path_);
  const Error error = error_of([&] { engine_.load(wanted); });
  EXPECT_EQ(error.code(), Errc::kFileChanged);
  EXPECT_EQ(error.path(), path_);
}

TEST_P(EngineTest, AnOpenDescriptorServesAnyLoadsWhateverStandsAtThePathByNow) {
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    const int fd = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    ASSERT_GE(fd, 0);
    ASSERT_EQ(::lseek(fd, 77, SEEK_SET), 77);
    testing::write_file(dir_ / "new", testing::random_bytes(bytes_.size(), 2));
    std::filesystem::rename(dir_ / "new", path_);
    GuardedMemory memory(bytes_.size());
    LoadRequest wanted = request(memory, 0, cache);
    wanted.files[0].fd = fd;
    Transfer transfer = engine_.start_load(wanted);
    GuardedMemory of_another(5000);
    wanted.files[0].extents = {{0, of_another.size(), of_another.data()}};
    Transfer another = engine_.start_load(wanted);
    const off_t position = ::lseek(fd, 0, SEEK_CUR);
    ASSERT_EQ(::close(fd), 0);  // It was borrowed until then.
    EXPECT_EQ(position, 77);
    EXPECT_NO_THROW(transfer.wait());
    EXPECT_TRUE(right(memory, 0));
    EXPECT_NO_THROW(another.wait());
    EXPECT_TRUE(right(of_another, 0));
    testing::write_file(path_, bytes_);
  }
}

TEST_P(EngineTest, ADescriptorThatIsNotOpenIsAnError) {
  const int fd = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  ::close(fd);
  GuardedMemory memory(1000);
  LoadRequest wanted = request(memory, 0);
  wanted.files[0].fd = fd;
  const Error error = error_of([&] { engine_.load(wanted); });
  EXPECT_EQ(error.code(), std::errc::bad_file_descriptor);
  EXPECT_EQ(error.path(), path_);
}

TEST_P(EngineTest, TargetsThatOverlapAreRefusedAtOnce) {
  GuardedMemory memory(1000);
  EXPECT_EQ(error_of([&] {
              (void)engine_.start_load(
                  {.files = {{.path = path_, .extents = {{0, 600, memory.data()}, {0, 600, memory.data() + 500}}}}});
            }).code(),
            Errc::kInvalidArgument);
  EXPECT_EQ(
      error_of([&] { (void)engine_.start_load({.files = {{.path = path_, .extents = {{0, 600, nullptr}}}}}); }).code(),
      Errc::kInvalidArgument);
}

TEST_P(EngineTest, APassedDeadlineEndsTheTransfer) {
  GuardedMemory memory(bytes_.size());
  LoadRequest late = request(memory, 0);
  late.deadline = std::chrono::steady_clock::now() - std::chrono::seconds(1);
  EXPECT_EQ(error_of([&] { engine_.load(late); }).code(), Errc::kDeadlineExceeded);
  EXPECT_TRUE(memory.intact());
  late.deadline = std::chrono::steady_clock::now() + std::chrono::hours(1);
  engine_.load(late);
  EXPECT_TRUE(right(memory, 0));
}

TEST_P(EngineTest, TheFarthestDeadlineAndTheLongestWaitAreFine) {
  GuardedMemory memory(bytes_.size());
  LoadRequest patient = request(memory, 0);
  patient.deadline = Deadline::max();
  Transfer transfer = engine_.start_load(patient);
  EXPECT_TRUE(transfer.wait_for(std::chrono::nanoseconds::max()));
  transfer.wait();
  EXPECT_TRUE(right(memory, 0));
}

TEST_P(EngineTest, CancelRightAfterTheStartIsNeverLost) {
  for (int round = 0; round < 20; ++round) {
    GuardedMemory first(bytes_.size());
    GuardedMemory second(bytes_.size());
    Transfer running = engine_.start_load(request(first, 0, CachePolicy::kDirect));
    Transfer doomed = engine_.start_load(request(second, 0, CachePolicy::kDirect));
    doomed.cancel();
    EXPECT_EQ(error_of([&] { doomed.wait(); }).code(), Errc::kCancelled);
    running.wait();
  }
}

// Starts one more load when the first has failed, while the engine is being closed.
struct Chained final : Completion {
  void done(Transfer&) noexcept override { next = engine->start_load(std::move(request)); }
  Engine* engine = nullptr;
  LoadRequest request;
  Transfer next;
};

TEST_P(EngineTest, ATransferStartedByACompletionEndsBeforeTheEngine) {
  GuardedMemory memory(bytes_.size());
  Chained chained;
  {
    Engine engine(small_engine(GetParam()));
    chained.engine = &engine;
    chained.request = request(memory, 0);
    Transfer missing = engine.start_load({.files = {{.path = dir_ / "none"}}}, &chained);
    EXPECT_THROW(missing.wait(), Error);
  }
  EXPECT_TRUE(chained.next.wait_for(std::chrono::nanoseconds(0)));
  EXPECT_TRUE(right(memory, 0));
}

TEST_P(EngineTest, DestroyedHandleMeansNothingIsInFlight) {
  for (int i = 0; i < 50; ++i) {
    auto memory = std::make_unique<GuardedMemory>(bytes_.size(), i % 2 ? 0 : 77);
    {
      const Transfer transfer = engine_.start_load(request(*memory, 0, CachePolicy::kDirect));
    }
    EXPECT_TRUE(memory->intact());
  }
}

TEST_P(EngineTest, TransfersOutliveTheirEngine) {
  GuardedMemory memory(bytes_.size());
  Transfer transfer;
  {
    Engine engine(small_engine(GetParam()));
    transfer = engine.start_load(request(memory, 0));
  }
  EXPECT_TRUE(transfer.wait_for(std::chrono::nanoseconds(0)));
  transfer.cancel();
  EXPECT_EQ(transfer.wait().requested_bytes, bytes_.size());
  EXPECT_TRUE(right(memory, 0));
}

TEST_P(EngineTest, DetachedTransfersAreFinishedByTheEngine) {
  GuardedMemory memory(bytes_.size());
  {
    Engine engine(small_engine(GetParam()));
    engine.start_load(request(memory, 0)).detach();
  }
  EXPECT_TRUE(right(memory, 0));
}

TEST_P(EngineTest, ProgressEndsAtTheTotal) {
  GuardedMemory memory(bytes_.size());
  Transfer transfer = engine_.start_load(request(memory, 0));
  EXPECT_EQ(transfer.progress().total_bytes, bytes_.size());
  transfer.wait();
  EXPECT_EQ(transfer.progress().done_bytes, bytes_.size());
  EXPECT_TRUE(transfer.progress().finished);
  EXPECT_EQ(transfer.progress().outstanding, 0u);
}

TEST_P(EngineTest, AForkedChildGetsAClearErrorAndCanMakeItsOwnEngine) {
  if (testing::kSanitizer)
    GTEST_SKIP() << "the sanitizers' locks may be held by a thread that the forked child does not have";
  GuardedMemory memory(1000);
  Transfer transfer = engine_.start_load(request(memory, 0));
  transfer.wait();
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    int failures = 0;
    try {
      engine_.load(request(memory, 0));
      ++failures;
    } catch (const Error& error) {
      failures += error.code() != Errc::kUnusable;
    }
    try {
      transfer.wait();
      ++failures;
    } catch (const Error& error) {
      failures += error.code() != Errc::kUnusable;
    }
    {
      const Engine inherited = std::move(engine_);
    }  // Releases nothing, waits for nobody.
    Engine own(small_engine(GetParam()));
    own.load(request(memory, 5));
    failures += !right(memory, 5);
    ::_exit(failures);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  engine_.load(request(memory, 7));
  EXPECT_TRUE(right(memory, 7));
}

TEST(EngineOptionsTest, OutOfRangeIsRefusedBeforeAnythingStarts) {
  for (const EngineOptions& options :
       {EngineOptions{.chunk_bytes = 3 * kMiB}, EngineOptions{.chunk_bytes = 4096}, EngineOptions{.queue_depth = 0},
        EngineOptions{.queue_depth = 5000}, EngineOptions{.staging_bytes = kMiB},
        EngineOptions{.staging_bytes = ~std::uint64_t{0}}, EngineOptions{.workers = 1000},
        EngineOptions{.cpu_affinity = {-1}}, EngineOptions{.numa_node = -2}}) {
    EXPECT_EQ(error_of([&] { Engine engine(options); }).code(), Errc::kInvalidArgument);
  }
}

TEST(EngineOptionsTest, ANodeThatIsNotThereIsToldByTheEngineAndByItsTransfers) {
  for (const int node : {1023, 5000}) {
    Engine engine({.numa_node = node});
    const std::string reason = "staging on NUMA node " + std::to_string(node);
    EXPECT_NE(engine.fallback_reason().find(reason), std::string::npos) << engine.fallback_reason();
    EXPECT_NE(engine.load({}).fallback_reason.find(reason), std::string::npos);
  }
}

TEST(BackendTest, AForcedOneIsTakenOrRefusedAndNeverReplaced) {
  const testing::TempDir dir;
  const auto bytes = testing::random_bytes(20 * kMiB + 9);
  testing::write_file(dir / "file", bytes);
  for (const Backend backend : {Backend::kIoUring, Backend::kPlainIoUring, Backend::kWorkers}) {
    std::optional<Engine> engine;
    try {
      engine.emplace(small_engine(backend));
    } catch (const Error& error) {
      EXPECT_NE(backend, Backend::kWorkers);
      EXPECT_NE(std::string(error.what()).find("io_uring"), std::string::npos) << error.what();
      continue;
    }
    GuardedMemory memory(bytes.size(), 64);  // Through slots, more often than there are slots.
    const TransferStats stats =
        engine->load({.files = {{.path = dir / "file", .extents = {{0, memory.size(), memory.data()}}}},
                      .cache = CachePolicy::kDirect});
    EXPECT_TRUE(memory.intact());
    EXPECT_TRUE(testing::same_bytes(memory.data(), bytes.data(), bytes.size()));
    EXPECT_EQ(stats.backend, backend);
    EXPECT_EQ(to_string(stats.backend), to_string(engine->options().backend));
    if (backend != Backend::kIoUring) {
      EXPECT_EQ(stats.fallback_reason, "") << "it is as asked";
    }
  }
}

// Without cachestat, where single pages tell. 0 is right, 2 that it cannot be tried here.
int load_with_every_other_page_cached() {
  const testing::TempDir dir;
  const auto bytes = testing::random_bytes(32 * kMiB);
  testing::write_file(dir / "file", bytes);
  testing::drop_from_cache(dir / "file");
  const int fd = ::open((dir / "file").c_str(), O_RDONLY | O_CLOEXEC);
  ::posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
  for (std::size_t at = 0; at < bytes.size(); at += 8192) {
    char byte = 0;
    if (::pread(fd, &byte, 1, static_cast<off_t>(at)) != 1) return 2;
  }
  ::close(fd);
  constexpr unsigned kSysCachestat = 451;
  if (!testing::deny_syscall(kSysCachestat, EPERM)) return 2;
  Engine engine(small_engine());
  GuardedMemory memory(bytes.size());
  const TransferStats stats =
      engine.load({.files = {{.path = dir / "file", .extents = {{0, memory.size(), memory.data()}}}}});
  if (!memory.intact() || !testing::same_bytes(memory.data(), bytes.data(), bytes.size())) return 1;
  if (stats.fallback_reason.find("taken for not cached") != std::string::npos) return 2;
  if (stats.fallback_reason.find("called cached were not") == std::string::npos) return 3;
  // A refused look starts readahead, which may fill a chunk before its turn comes; that one is rightly buffered.
  return stats.direct_bytes >= bytes.size() * 3 / 4 && stats.retries >= 4 ? 0 : 4;
}

TEST(RoutingTest, ChunksWronglyCalledCachedGoPastTheCacheAndSoDoesTheRest) {
  const int status = testing::run_in_child(load_with_every_other_page_cached);
  if (status == 2) GTEST_SKIP() << "no seccomp, no RWF_NOWAIT, or another size of page";
  EXPECT_EQ(status, 0);
}

std::size_t resident_bytes() {
  std::size_t all_pages = 0;
  std::size_t resident_pages = 0;
  std::ifstream("/proc/self/statm") >> all_pages >> resident_pages;
  return resident_pages * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

TEST_P(EngineTest, ManyQueuedLoadsStayWithinTheStagingMemory) {
  if (testing::kSanitizer) GTEST_SKIP() << "the sanitizers' own memory is in the way";
  std::vector<std::unique_ptr<GuardedMemory>> memory;
  for (int i = 0; i < 30; ++i) memory.push_back(std::make_unique<GuardedMemory>(bytes_.size(), 64));  // None in place.
  const std::size_t before = resident_bytes();
  std::vector<Transfer> transfers;
  for (auto& one : memory) transfers.push_back(engine_.start_load(request(*one, 0, CachePolicy::kDirect)));
  for (Transfer& transfer : transfers) transfer.wait();
  const std::size_t grown = resident_bytes() - std::min(before, resident_bytes());
  // As much again takes the place of slots whose reads are late, on a disk that others keep busy.
  EXPECT_LE(grown, 2 * engine_.options().staging_bytes + 2 * kMiB) << "the loads need 30 times as much";
  for (auto& one : memory) EXPECT_TRUE(right(*one, 0));
}

TEST(EngineOptionsTest, DefaultsAreResolved) {
  const Engine engine;
  EXPECT_EQ(engine.options().workers, std::clamp(std::thread::hardware_concurrency(), 2u, 8u));
  EXPECT_EQ(engine.options().staging_bytes, 64 * kMiB);
  EXPECT_NE(engine.options().backend, Backend::kAuto);
}

}  // namespace
}  // namespace flashpack
