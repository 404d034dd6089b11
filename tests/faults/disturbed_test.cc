// Loads of files that others change, by processes that fork, and loads that are interrupted.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/sandbox.h"
#include "tests/support/sanitizers.h"
#include "tests/support/small_loads.h"
#include "tests/support/spin.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

using testing::GuardedMemory;
using testing::kMiB;
using testing::request;
using testing::right;
using testing::run_in_child;
using testing::small_engine;

class DisturbedTest : public ::testing::TestWithParam<Backend> {
 protected:
  DisturbedTest() { testing::write_file(dir_ / "file", bytes_); }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "file";
  // Many chunks for an engine with four slots. The thread sanitizer takes its time with every page.
  std::vector<std::byte> bytes_ = testing::random_bytes((testing::kThreadSanitizer ? 8 : 16) * kMiB + 9);
  Engine engine_{small_engine(GetParam())};
  std::mt19937_64 random_{1};
};

INSTANTIATE_TEST_SUITE_P(Backends, DisturbedTest, ::testing::Values(Backend::kAuto, Backend::kWorkers),
                         [](const auto& backend) { return backend.param == Backend::kAuto ? "Auto" : "Workers"; });

// Every page of a version carries its stamp, so that a mixture shows. An mtime has a resolution; it is set by hand, so
// that a change always shows.
TEST_P(DisturbedTest, AFileThatIsChangedInPlaceIsOneVersionOrAnError) {
  constexpr int kRounds = 100;
  const std::size_t size = bytes_.size();
  int errors = 0;
  for (int round = 1; round <= kRounds; ++round) {
    const auto old = testing::same_byte_everywhere(size, static_cast<std::byte>(round));
    testing::write_file(path_, old);
    if (round % 2) testing::drop_from_cache(path_);
    GuardedMemory memory(size, round % 3 ? 0 : 64);
    Transfer transfer = engine_.start_load(request(path_, memory));
    testing::spin(std::chrono::microseconds(random_() % 150));
    const bool cut = round % 2 == 0;
    if (cut) {
      std::filesystem::resize_file(path_, random_() % size);
    } else {
      const int fd = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);
      const auto other = testing::same_byte_everywhere(size / 2, std::byte{0xFF});
      const testing::Unseen unseen;
      EXPECT_GT(::pwrite(fd, other.data(), other.size(), static_cast<off_t>(size / 4)), 0);
      const timespec later[2] = {{.tv_sec = 1000 + round, .tv_nsec = 0}, {.tv_sec = 1000 + round, .tv_nsec = 0}};
      EXPECT_EQ(::futimens(fd, later), 0);
      ::close(fd);
    }
    try {
      transfer.wait();
      // The file is opened when the load's turn comes, which may be after the change.
      const bool before = testing::same_bytes(memory.data(), old.data(), size);
      const bool after = !cut && testing::same_bytes(memory.data(), testing::read_file(path_).data(), size);
      EXPECT_TRUE(before || after) << "a mixture was called a success in round " << round;
    } catch (const Error& error) {
      ++errors;
      EXPECT_TRUE(error.code() == Errc::kFileChanged || error.code() == Errc::kTruncated) << error.what();
    }
    EXPECT_TRUE(memory.intact());
  }
  EXPECT_GT(errors, 0) << "no change came in time; nothing was shown";
}

TEST_P(DisturbedTest, AFileThatIsReplacedByRenameIsTheOldOneOrTheNewOne) {
  auto other = bytes_;
  for (std::byte& byte : other) byte = ~byte;
  for (int round = 0; round < 40; ++round) {
    testing::write_file(dir_ / "new", round % 2 ? bytes_ : other);
    GuardedMemory memory(bytes_.size());
    Transfer transfer = engine_.start_load(request(path_, memory, CachePolicy::kDirect));
    testing::spin(std::chrono::microseconds(random_() % 50));
    std::filesystem::rename(dir_ / "new", path_);
    transfer.wait();
    EXPECT_TRUE(right(memory, bytes_) || right(memory, other));
  }
}

TEST_P(DisturbedTest, ForksDuringALoadLeaveTheParentItsBytes) {
  if (testing::kSanitizer)
    GTEST_SKIP() << "the sanitizers' locks may be held by a thread that the forked child does not have";
  int forks = 0;
  for (int load = 0; load < 10; ++load) {
    testing::drop_from_cache(path_);
    GuardedMemory memory(bytes_.size(), load % 2 ? 64 : 0);
    Transfer transfer = engine_.start_load(request(path_, memory, CachePolicy::kDirect));
    for (int i = 0; i < 20 && (i < 3 || !transfer.wait_for(std::chrono::nanoseconds(0))); ++i, ++forks) {
      const int status = run_in_child([&] {
        // A child that writes where the kernel reads for the parent.
        if (i % 2) std::memset(memory.data(), 0x5A, memory.size());
        return 0;
      });
      EXPECT_EQ(status, 0);
    }
    transfer.wait();
    EXPECT_TRUE(right(memory, bytes_));
  }
  EXPECT_GE(forks, 30);
}

TEST_P(DisturbedTest, TwoHundredInterruptionsLeaveNothingInFlightAndAnEngineThatWorks) {
  int interrupted = 0;
  for (int round = 0; round < 200; ++round) {
    if (round % 4 == 0) testing::drop_from_cache(path_);
    auto memory = std::make_unique<GuardedMemory>(bytes_.size(), round % 2 ? 64 : 0);
    LoadRequest wanted = request(path_, *memory, round % 3 ? CachePolicy::kDirect : CachePolicy::kAuto);
    if (round % 5 == 0)
      wanted.deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(random_() % 8000);
    Transfer transfer = engine_.start_load(wanted);
    testing::spin(std::chrono::microseconds(random_() % 200));
    if (round % 5 == 1) {
      std::thread([&] { transfer.cancel(); }).join();
    } else if (round % 5 == 2) {
      transfer = Transfer();
    } else if (round % 5 == 3) {
      transfer.cancel();
      transfer.cancel();
    }
    if (transfer.valid()) {
      try {
        transfer.wait();
        EXPECT_TRUE(right(*memory, bytes_));
      } catch (const Error& error) {
        ++interrupted;
        EXPECT_TRUE(error.code() == Errc::kCancelled || error.code() == Errc::kDeadlineExceeded) << error.what();
      }
      EXPECT_EQ(transfer.progress().outstanding, 0u);
    }
    EXPECT_TRUE(memory->intact());
    memory.reset();  // The pages go back at once: whatever were still in flight would be written into others'.
    if (round % 20 == 0) {
      GuardedMemory again(bytes_.size());
      engine_.load(request(path_, again));
      EXPECT_TRUE(right(again, bytes_));
    }
  }
  EXPECT_GT(interrupted, 20) << "too few came in time";
}

double cached_fraction(const std::filesystem::path& path, std::size_t size) {
  constexpr long kSysCachestat = 451;
  struct {
    std::uint64_t offset, size;
  } range{0, size};
  std::uint64_t counts[5] = {};
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const long result = ::syscall(kSysCachestat, fd, &range, counts, 0);
  ::close(fd);
  return result != 0 ? -1 : static_cast<double>(counts[0]) * 4096 / static_cast<double>(size);
}

TEST_P(DisturbedTest, AfterALoadThePageCacheIsKeptOrDroppedAsAskedFor) {
  testing::drop_from_cache(path_);
  GuardedMemory memory(bytes_.size());
  engine_.load(request(path_, memory, CachePolicy::kBuffered));
  if (cached_fraction(path_, bytes_.size()) < 0) GTEST_SKIP() << "cachestat is not to be had here";
  EXPECT_GT(cached_fraction(path_, bytes_.size()), 0.99);
  for (const CachePolicy cache : {CachePolicy::kAuto, CachePolicy::kBuffered}) {
    testing::read_file(path_);
    LoadRequest dropping = request(path_, memory, cache);
    dropping.after = AfterLoad::kDrop;
    engine_.load(dropping);
    EXPECT_TRUE(right(memory, bytes_));
    EXPECT_LT(cached_fraction(path_, bytes_.size()), 0.1);
  }
}

TEST_P(DisturbedTest, AFileThatTheLoadHasNotReadThroughThePageCacheStaysThere) {
  const std::filesystem::path direct = dir_ / "direct";
  testing::write_file(direct, bytes_);
  for (const std::filesystem::path& path : {path_, direct}) testing::drop_from_cache(path);
  GuardedMemory first(kMiB);
  GuardedMemory last(kMiB);
  LoadRequest cached{.files = {{.path = direct, .extents = {{0, kMiB, first.data()}}}},
                     .cache = CachePolicy::kBuffered};
  engine_.load(cached);
  if (cached_fraction(direct, kMiB) < 0) GTEST_SKIP() << "cachestat is not to be had here";
  GuardedMemory memory(bytes_.size());
  testing::read_file(path_);
  LoadRequest both = request(path_, memory);
  both.files.push_back({.path = direct, .extents = {{bytes_.size() - kMiB, kMiB, last.data()}}});
  both.after = AfterLoad::kDrop;
  const TransferStats stats = engine_.load(both);
  if (stats.direct_bytes == 0) GTEST_SKIP() << "no direct I/O here";
  EXPECT_LT(cached_fraction(path_, bytes_.size()), 0.1);
  EXPECT_GT(cached_fraction(direct, kMiB), 0.9);
}

}  // namespace
}  // namespace flashpack
