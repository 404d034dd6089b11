#include "flashpack/file_handle.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <list>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang.h"
#include "tests/support/open_descriptors.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

using testing::GuardedMemory;
using testing::kHang;
using testing::kMiB;
using testing::open_descriptors_of;

constexpr unsigned kSysCachestat = 451;  // Older headers lack it.

template <class Call>
std::error_code code_of(Call call) {
  try {
    call();
    return {};
  } catch (const Error& error) {
    return error.code();
  }
}

// Tells which thread was told, and of how many extents.
struct Listener final : Completion {
  void landed(std::size_t, std::size_t) noexcept override { ++extents; }
  void done(Transfer&) noexcept override { thread = std::this_thread::get_id(); }
  std::thread::id thread;
  int extents = 0;
};

class FileHandleTest : public ::testing::TestWithParam<Backend> {
 protected:
  FileHandleTest() { testing::write_file(path_, bytes_); }

  static LoadRequest request(const FileHandle& file, std::uint64_t offset, GuardedMemory& memory,
                             CachePolicy cache = CachePolicy::kAuto) {
    return {.files = {{.extents = {{offset, memory.size(), memory.data()}}, .handle = file}}, .cache = cache};
  }
  bool right(const GuardedMemory& memory, std::uint64_t offset) const {
    return memory.intact() && testing::same_bytes(memory.data(), bytes_.data() + offset, memory.size());
  }

  testing::TempDir dir_;
  const std::filesystem::path path_ = dir_ / "model";
  const std::vector<std::byte> bytes_ = testing::random_bytes(5 * kMiB + 1234);
  std::optional<Engine> engine_{
      EngineOptions{.chunk_bytes = kMiB, .staging_bytes = 4 * kMiB, .workers = 2, .backend = GetParam()}};
};

INSTANTIATE_TEST_SUITE_P(Backends, FileHandleTest, ::testing::Values(Backend::kAuto, Backend::kWorkers),
                         [](const auto& of) { return of.param == Backend::kAuto ? "Auto" : "Workers"; });

TEST_P(FileHandleTest, LoadsOfEverySizePolicyAndCacheStateHaveTheirBytes) {
  const FileHandle file = engine_->open(path_);
  EXPECT_EQ(file.path(), path_);
  EXPECT_EQ(file.identity().size_bytes, bytes_.size());
  EXPECT_EQ(file.alignment_bytes() % 4096, 0u);
  for (const CachePolicy cache : {CachePolicy::kAuto, CachePolicy::kDirect, CachePolicy::kBuffered}) {
    for (const std::size_t size : {std::size_t{1}, std::size_t{4096}, std::size_t{300'000}, bytes_.size() - 4096}) {
      for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{4095}}) {
        for (const bool cold : {true, false}) {
          if (cold) testing::drop_from_cache(path_);
          GuardedMemory memory(size, offset % 4096);
          const TransferStats stats = engine_->load(request(file, offset, memory, cache));
          EXPECT_TRUE(right(memory, offset)) << static_cast<int>(cache) << " " << size << " " << offset << " " << cold;
          EXPECT_EQ(stats.requested_bytes, size);
          EXPECT_GE(stats.direct_bytes + stats.buffered_bytes, size);
        }
      }
    }
  }
}

TEST_P(FileHandleTest, TheHandleKeepsItsFileWhateverIsAtThePath) {
  const FileHandle file = engine_->open(path_);
  std::filesystem::remove(path_);
  testing::write_file(path_, std::vector<std::byte>(100));
  GuardedMemory memory(kMiB);
  engine_->load(request(file, 5, memory));
  EXPECT_TRUE(right(memory, 5));
  EXPECT_TRUE(file.unchanged());
}

TEST_P(FileHandleTest, LittleThatIsCachedIsReadBeforeTheStartReturnsUnlessTheDriverIsToTellOfIt) {
  const testing::HeldInCache held(path_);
  const FileHandle file = engine_->open(path_);
  GuardedMemory memory(5000);
  Transfer load = engine_->start_load(request(file, 7, memory));
  EXPECT_TRUE(load.wait_for(std::chrono::nanoseconds(0)));
  const TransferStats stats = load.wait();
  EXPECT_TRUE(right(memory, 7));
  EXPECT_EQ(stats.buffered_bytes, 5000u);
  EXPECT_EQ(stats.operations, 1u);
  EXPECT_GT(stats.seconds, 0);
  EXPECT_EQ(load.progress().done_bytes, 5000u);

  Listener listener;
  LoadRequest told = request(file, 7, memory);
  told.report_extents = true;
  engine_->start_load(std::move(told), &listener).wait();
  EXPECT_NE(listener.thread, std::this_thread::get_id());
  EXPECT_EQ(listener.extents, 1);
}

TEST_P(FileHandleTest, ADeadlineThatHasPassedEndsALoadOfCachedBytes) {
  const testing::HeldInCache held(path_);
  const FileHandle file = engine_->open(path_);
  GuardedMemory memory(5000);
  LoadRequest late = request(file, 0, memory);
  late.deadline = std::chrono::steady_clock::now();
  EXPECT_EQ(code_of([&] { engine_->load(std::move(late)); }), Errc::kDeadlineExceeded);
}

TEST_P(FileHandleTest, AThousandLoadsOfOneHandleAtATimeHaveTheirBytesAndOthersGoOnBesideThem) {
  struct Load {
    std::unique_ptr<GuardedMemory> memory;
    std::uint64_t offset;
    Transfer transfer;
  };
  testing::drop_from_cache(path_);
  const FileHandle file = engine_->open(path_);
  std::mt19937 random(1);
  std::list<Load> loads;
  for (int i = 0; i < 1000; ++i) {
    const std::size_t size = 1 + random() % 20'000;
    const std::uint64_t offset = random() % (bytes_.size() - size);
    auto memory = std::make_unique<GuardedMemory>(size, random() % 4096);
    Transfer transfer = engine_->start_load(request(file, offset, *memory, CachePolicy::kDirect));
    loads.push_back({std::move(memory), offset, std::move(transfer)});
  }
  GuardedMemory whole(bytes_.size());
  engine_->load({.files = {{.path = path_, .extents = {{0, whole.size(), whole.data()}}}}});
  EXPECT_TRUE(right(whole, 0));
  for (Load& load : loads) {
    ASSERT_TRUE(load.transfer.wait_for(kHang));
    load.transfer.wait();
    ASSERT_TRUE(right(*load.memory, load.offset));
  }
}

TEST_P(FileHandleTest, OneRequestMayHaveHandlesAndPaths) {
  const FileHandle file = engine_->open(path_);
  GuardedMemory first(10'000);
  GuardedMemory second(10'000);
  engine_->load({.files = {{.extents = {{100, first.size(), first.data()}}, .handle = file},
                           {.path = path_, .extents = {{200, second.size(), second.data()}}}}});
  EXPECT_TRUE(right(first, 100));
  EXPECT_TRUE(right(second, 200));
}

TEST_P(FileHandleTest, AHandleOfAnotherEngineIsRefused) {
  GuardedMemory memory(100);
  const FileHandle file = Engine().open(path_);  // The handle outlives its engine.
  EXPECT_EQ(code_of([&] { static_cast<void>(engine_->start_load(request(file, 0, memory))); }), Errc::kInvalidArgument);
}

TEST_P(FileHandleTest, ARefusedArgumentNamesTheFileOfTheHandleWhateverThePathSays) {
  const FileHandle file = engine_->open(path_);
  try {
    engine_->load({.files = {{.path = "another", .extents = {{0, 1, nullptr}}, .handle = file}}});
    ADD_FAILURE() << "it has no target";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kInvalidArgument);
    EXPECT_EQ(error.path(), path_);
  }
}

TEST_P(FileHandleTest, AnExtentPastTheEndIsTheTransfersErrorAndNamesTheFile) {
  const FileHandle file = engine_->open(path_);
  GuardedMemory memory(100);
  Transfer load = engine_->start_load(request(file, bytes_.size() - 50, memory));
  try {
    load.wait();
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kTruncated);
    EXPECT_EQ(error.path(), path_);
  }
}

TEST_P(FileHandleTest, ChecksumsAreComparedThroughAHandle) {
  Checksums checksums{.size_bytes = bytes_.size()};
  {
    FileWriter writer = engine_->create(dir_ / "summed", {.checksums = true});
    writer.write({.extents = {{0, bytes_.size(), bytes_.data()}}});
    checksums = writer.checksums();
    writer.commit();
  }
  const FileHandle file = engine_->open(dir_ / "summed");
  GuardedMemory memory(bytes_.size());
  LoadRequest wanted = request(file, 0, memory);
  wanted.files[0].checksums = &checksums;
  EXPECT_EQ(engine_->load(wanted).verified_bytes, bytes_.size());
  checksums.crc32c[2] ^= 1;
  EXPECT_EQ(code_of([&] { engine_->load(wanted); }), Errc::kCorrupt);
}

TEST_P(FileHandleTest, AFileThatHasChangedSinceItWasOpenedIsNoticedByALargeLoadAndByAQuestion) {
  const FileHandle file = engine_->open(path_);
  testing::write_file(path_, bytes_);  // In place, with another mtime.
  std::filesystem::last_write_time(path_, std::filesystem::file_time_type::clock::now() - std::chrono::hours(1));
  EXPECT_EQ(file.check(), Errc::kFileChanged);
  EXPECT_FALSE(file.unchanged());
  GuardedMemory large(2 * kMiB);
  EXPECT_EQ(code_of([&] { engine_->load(request(file, 0, large)); }), Errc::kFileChanged);
}

TEST_P(FileHandleTest, AnotherFileThanExpectedIsNotOpened) {
  FileIdentity other = engine_->open(path_).identity();
  ++other.mtime_ns;
  EXPECT_EQ(code_of([&] { engine_->open(path_, other); }), Errc::kFileChanged);
  std::error_code error;
  EXPECT_FALSE(engine_->open(dir_ / "missing", {}, -1, error).valid());
  EXPECT_EQ(error, std::errc::no_such_file_or_directory);
  EXPECT_TRUE(engine_->open(path_, {}, -1, error).valid());
  EXPECT_FALSE(error);
}

TEST_P(FileHandleTest, ADescriptorIsOpenedAsTheFileThatItIs) {
  const int fd = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  std::filesystem::remove(path_);
  const FileHandle file = engine_->open("a name", {}, fd);
  ::close(fd);
  GuardedMemory memory(5000);
  engine_->load(request(file, 9, memory));
  EXPECT_TRUE(right(memory, 9));
}

TEST_P(FileHandleTest, LoadsOpenNothingThoughTheKernelDoesNotSayWhatIsCached) {
  engine_.reset();  // The thread sanitizer allows the child of threads no threads.
  const int status = testing::run_in_child([&] {
    if (!testing::deny_syscall(kSysCachestat, ENOSYS)) return testing::kSkip;
    Engine engine({.chunk_bytes = kMiB, .staging_bytes = 4 * kMiB, .workers = 2, .backend = GetParam()});
    const FileHandle file = engine.open(path_);
    const std::ptrdiff_t before = open_descriptors_of(path_);
    std::list<GuardedMemory> memory;
    std::vector<Transfer> loads;
    for (int i = 0; i < 50; ++i) {
      loads.push_back(engine.start_load(request(file, 100, memory.emplace_back(5000))));
      if (!loads.back().wait_for(kHang) || loads.back().error()) return 1;
      if (!right(memory.back(), 100)) return 2;
    }
    return open_descriptors_of(path_) == before ? 0 : 3;
  });
  if (status == testing::kSkip) GTEST_SKIP() << "no seccomp here";
  EXPECT_EQ(status, 0) << "1: a load failed, 2: wrong bytes, 3: the loads hold descriptors";
}

TEST_P(FileHandleTest, TheFileIsClosedAfterTheLastCopyAndTheLastLoad) {
  std::vector<Transfer> loads;
  std::list<GuardedMemory> memory;
  {
    FileHandle file = engine_->open(path_);
    const FileHandle copy = file;
    file = {};
    EXPECT_GT(open_descriptors_of(path_), 0);
    for (int i = 0; i < 40; ++i)
      loads.push_back(engine_->start_load(request(copy, 0, memory.emplace_back(10'000), CachePolicy::kDirect)));
    loads[20].cancel();
  }
  for (Transfer& load : loads) EXPECT_TRUE(load.wait_for(kHang));
  engine_.reset();  // Its threads have ended.
  EXPECT_EQ(open_descriptors_of(path_), 0) << "though the transfers are still there";
}

}  // namespace
}  // namespace flashpack
