// A file system that does not answer holds up its own transfers and nothing else.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <functional>
#include <future>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "engine/ground/unique_fd.h"
#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang_fixture.h"
#include "tests/support/open_descriptors.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

INSTANTIATE_TEST_SUITE_P(Backends, HangTest, ::testing::Values(Backend::kAuto, Backend::kWorkers),
                         [](const auto& of) { return of.param == Backend::kAuto ? "Auto" : "Workers"; });

TEST_P(HangTest, CancelledReadsThroughSlotsThatHangHoldUpNoOtherLoad) {
  leave_stuck_loads(2, 64);
  expect_that_others_go_on();
  expect_that_stuck_loads_end(2);
}

TEST_P(HangTest, CancelledReadsInPlaceThatHangHoldUpNoOtherLoad) {
  leave_stuck_loads(6, 0);
  expect_that_others_go_on();
  expect_that_stuck_loads_end(6);
}

// What happens to a file when all of it has been read.
TEST_P(HangTest, AFileThatHangsAfterItsLastReadHoldsUpNoOtherLoad) {
  for (const char* op : {"getattr", "flush", "release"}) {
    fs_->hold("read", "stuck");
    Load& load = start(*fs_ / "stuck", 0);
    ASSERT_TRUE(fs_->wait_until_held("read", "stuck"));
    fs_->hold(op, "stuck");
    fs_->release("read", "stuck");
    ASSERT_TRUE(fs_->wait_until_held(op, "stuck"));
    SCOPED_TRACE(op);
    expect_that_others_go_on();
    fs_->release();
    EXPECT_EQ(outcome(load), std::error_code());
    EXPECT_TRUE(right(load));
  }
}

TEST_P(HangTest, AFileThatHangsWhenItIsOpenedHoldsUpNoOtherLoad) {
  for (const char* op : {"lookup", "open", "getattr"}) {
    fs_->hold(op, "stuck");
    GuardedMemory memory(bytes_.size());
    auto loaded = std::async(std::launch::async, [&] { engine_->load(request(*fs_ / "stuck", memory)); });
    if (!fs_->wait_until_held(op, "stuck")) ADD_FAILURE() << op;
    SCOPED_TRACE(op);
    expect_that_others_go_on();
    fs_->release();
    EXPECT_NO_THROW(loaded.get());
    EXPECT_TRUE(testing::same_bytes(memory.data(), bytes_.data(), bytes_.size()));
  }
}

TEST_P(HangTest, AnEngineWithReadsThatHangIsDestroyedWhenTheyAreAnswered) {
  leave_stuck_loads(1, 64);
  auto destroyed = std::async(std::launch::async, [this] { engine_.reset(); });
  fs_->release();
  EXPECT_EQ(destroyed.wait_for(kHang), std::future_status::ready);
  EXPECT_EQ(outcome(loads_.front()), Errc::kCancelled);
}

TEST_P(HangTest, WritesThatHangHoldUpNoOtherLoadAndEndWithWhatStoppedThemMeanwhile) {
  for (const unsigned phase : {0u, 64u}) {
    FileWriter writer = engine_->create(*fs_ / "new");
    GuardedMemory source(bytes_.size(), phase);
    fs_->hold("write", "*");
    std::optional<Deadline> deadline;  // It is far, because on a busy machine the first write may begin late.
    if (phase == 0) deadline = std::chrono::steady_clock::now() + std::chrono::seconds(3);
    Transfer write = writer.start_write({.extents = {{0, source.size(), source.data()}}, .deadline = deadline});
    EXPECT_TRUE(fs_->wait_until_held("write", "*"));
    deadline ? std::this_thread::sleep_until(*deadline) : write.cancel();
    expect_that_others_go_on();
    fs_->release();
    ASSERT_TRUE(write.wait_for(kHang));
    EXPECT_EQ(write.error(), deadline ? Errc::kDeadlineExceeded : Errc::kCancelled);
  }
}

// More reads wait for a worker than there are workers.
TEST_P(HangTest, ALoadThatHasItsBytesIsFinishedThoughAllWorkersHang) {
  testing::write_file(*fs_ / "mine", std::span(bytes_).first(4096));
  for (const CachePolicy policy : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    fs_->hold("read", "mine");
    fs_->hold("read", "stuck");
    Load& mine = loads_.emplace_back();
    mine.memory = std::make_unique<GuardedMemory>(4096);
    mine.transfer = engine_->start_load(request(*fs_ / "mine", *mine.memory, policy));
    ASSERT_TRUE(fs_->wait_until_held("read", "mine"));
    GuardedMemory memory(bytes_.size());
    Transfer stuck = engine_->start_load(request(*fs_ / "stuck", memory, policy));
    EXPECT_TRUE(fs_->wait_until_held("read", "stuck"));
    fs_->release("read", "mine");
    EXPECT_EQ(outcome(mine), std::error_code());
    EXPECT_TRUE(testing::same_bytes(mine.memory->data(), bytes_.data(), 4096));
    fs_->release();
    EXPECT_NO_THROW(stuck.wait());
  }
}

TEST_P(HangTest, ReadsThatHangHoldUpNoOtherLoadThoughNobodyCancelsThem) {
  testing::write_file(*fs_ / "neighbour", bytes_);
  fs_->hold("read", "stuck");
  Load& in_place = start(*fs_ / "stuck", 0);
  Load& through_slots = start(*fs_ / "stuck", 64);
  ASSERT_TRUE(fs_->wait_until_held("read", "stuck"));
  expect_that_others_go_on();
  Load& neighbour = start(*fs_ / "neighbour", 64);
  EXPECT_EQ(outcome(neighbour), std::error_code());
  EXPECT_TRUE(right(neighbour));
  fs_->release();
  for (Load* load : {&in_place, &through_slots}) {
    EXPECT_EQ(outcome(*load), std::error_code());
    EXPECT_TRUE(right(*load));
  }
}

TEST_P(HangTest, ALoadIsFinishedThoughItsFileDoesNotClose) {
  fs_->hold("flush", "stuck");
  Load& load = start(*fs_ / "stuck", 0);
  EXPECT_EQ(outcome(load), std::error_code());
  EXPECT_TRUE(right(load));
}

TEST_P(HangTest, DeadlineAndCancelEndALoadWhoseFileIsNotOpened) {
  fs_->hold("open", "stuck");
  Load& late = start(*fs_ / "stuck", 0, std::chrono::steady_clock::now() + std::chrono::milliseconds(20));
  Load& cancelled = start(*fs_ / "stuck", 0);
  ASSERT_TRUE(fs_->wait_until_held("open", "stuck"));
  cancelled.transfer->cancel();
  EXPECT_EQ(outcome(cancelled), Errc::kCancelled);
  EXPECT_EQ(outcome(late), Errc::kDeadlineExceeded);
}

TEST_P(HangTest, ACancelledLoadOfAHangingFileEndsThoughAnotherReadOfItHangs) {
  fs_->hold("getattr", "stuck");
  Load& first = start(*fs_ / "stuck", 0);
  ASSERT_TRUE(fs_->wait_until_held("getattr", "stuck"));
  for (int i = 0; i < 40; ++i) start(*fs_ / "stuck", 0).transfer->cancel();
  for (Load& load : loads_) {
    if (&load == &first) continue;
    ASSERT_EQ(outcome(load), Errc::kCancelled);
  }
  expect_that_others_go_on();
  fs_->release();
  EXPECT_EQ(outcome(first), std::error_code());
}

TEST_P(HangTest, AnEngineIsDestroyedThoughFilesNeitherOpenNorClose) {
  testing::write_file(*fs_ / "unclosed", bytes_);
  fs_->hold("flush", "unclosed");
  fs_->hold("open", "stuck");
  Load& unclosed = start(*fs_ / "unclosed", 0);
  Load& unopened = start(*fs_ / "stuck", 0);
  ASSERT_TRUE(fs_->wait_until_held("flush", "unclosed"));
  ASSERT_TRUE(fs_->wait_until_held("open", "stuck"));
  unopened.transfer->cancel();
  EXPECT_EQ(outcome(unclosed), std::error_code());
  auto destroyed = std::async(std::launch::async, [this] { engine_.reset(); });
  EXPECT_EQ(destroyed.wait_for(kHang), std::future_status::ready);
  fs_->release();
}

TEST_P(HangTest, ACrowdOfFilesThatDoNotOpenHoldsUpNoOtherLoad) {
  fs_->hold("lookup", "*");
  start_a_crowd([this](int i) { return *fs_ / ("missing" + std::to_string(i)); }, 100);
  ASSERT_TRUE(fs_->wait_until_held("lookup", "*"));
  Load& other = start(dir_ / "other", 0);
  EXPECT_EQ(outcome(other), std::error_code());
  EXPECT_TRUE(right(other));
  fs_->release();
}

TEST_P(HangTest, MoreFilesThatDoNotOpenThanMayBeStuckHoldUpNoOtherLoad) {
  fs_->hold("lookup", "*");
  start_a_crowd([this](int i) { return *fs_ / ("missing" + std::to_string(i % 50)) / std::to_string(i); });
  wait_until_stuck(kEnough);
  expect_that_others_keep_going_on();
  fs_->release();
  expect_that_the_crowd_ends(std::make_error_code(std::errc::no_such_file_or_directory));
}

// Its path does not tell where it leads.
TEST_P(HangTest, MoreFilesBehindALinkThatDoNotOpenThanMayBeStuckHoldUpNoOtherLoad) {
  std::filesystem::create_symlink(*fs_ / ".", dir_ / "link");
  fs_->hold("lookup", "*");
  start_a_crowd([this](int i) { return dir_ / "link" / ("missing" + std::to_string(i)); });
  wait_until_stuck(kEnough);
  expect_that_others_keep_going_on();
  fs_->release();
  expect_that_the_crowd_ends(std::make_error_code(std::errc::no_such_file_or_directory));
}

TEST_P(HangTest, MoreFilesThatDoNotCloseThanMayBeStuckHoldUpNoOtherLoad) {
  for (int i = 0; i < kCrowd; ++i) testing::write_file(*fs_ / std::to_string(i), std::span(bytes_).first(4096));
  fs_->hold("flush", "*");
  start_a_crowd([this](int i) { return *fs_ / std::to_string(i); });
  ASSERT_TRUE(fs_->wait_until_held("flush", "*", kEnough));
  expect_that_others_keep_going_on();
  fs_->release();
  expect_that_the_crowd_ends({});
}

TEST_P(HangTest, MoreOpenFilesWhoseReadsHangThanMayBeStuckHoldUpNoOtherLoad) {
  for (int i = 0; i < kCrowd; ++i) testing::write_file(*fs_ / std::to_string(i), std::span(bytes_).first(4096));
  fs_->hold("read", "*");
  start_a_crowd([this](int i) { return *fs_ / std::to_string(i); });
  wait_until_stuck(GetParam() == Backend::kWorkers ? kWorkers : kDepth);
  expect_that_others_keep_going_on();
  fs_->release();
  expect_that_the_crowd_ends({});
}

TEST_P(HangTest, LoadsThroughAHandleThatHangHoldUpNoOtherLoadAndEndWhenTheFileAnswers) {
  FileHandle file = engine_->open(*fs_ / "stuck");
  fs_->hold("read", "stuck");
  for (int i = 0; i < 2000; ++i) {
    Load& load = loads_.emplace_back();
    load.memory = std::make_unique<GuardedMemory>(4096);
    load.transfer = engine_->start_load({.files = {{.extents = {{0, 4096, load.memory->data()}}, .handle = file}}});
  }
  file = {};
  EXPECT_TRUE(fs_->wait_until_held("read", "stuck"));
  fs_->hold("flush", "stuck");
  expect_that_others_keep_going_on();
  loads_.begin()->transfer->cancel();
  std::next(loads_.begin(), 1000)->transfer->cancel();
  expect_that_others_go_on();
  fs_->release();
  for (Load& load : loads_) {
    const std::error_code how = outcome(load);
    if (load.memory->size() == 4096 && how != Errc::kCancelled) {
      ASSERT_EQ(how, std::error_code());
      ASSERT_TRUE(testing::same_bytes(load.memory->data(), bytes_.data(), 4096));
    }
  }
}

TEST_P(HangTest, FiveThousandLoadsOfOneFileThatHangsHoldUpNoOtherLoadAndEndWhenItAnswers) {
  for (const char* op : {"open", "read"}) {
    fs_->hold(op, "stuck");
    start_a_crowd([this](int) { return *fs_ / "stuck"; }, 5000);
    EXPECT_TRUE(fs_->wait_until_held(op, "stuck"));
    SCOPED_TRACE(op);
    expect_that_others_go_on();
    fs_->release();
    expect_that_the_crowd_ends({});
    EXPECT_TRUE(std::all_of(loads_.begin(), loads_.end(), [this](const Load& load) {
      return load.memory->size() != 4096 || testing::same_bytes(load.memory->data(), bytes_.data(), 4096);
    }));
    loads_.clear();
  }
}

TEST_P(HangTest, AStoreThatHangsWhereverItDoesHoldsUpNoLoadOfAnotherFileSystem) {
  GuardedMemory source(kMiB);
  for (const std::string op : {"create", "fallocate", "fsync", "setattr", "rename", "unlink"}) {
    fs_->hold(op, "*");
    auto stored = std::async(std::launch::async, [&] {
      FileWriter writer = engine_->create(*fs_ / "new", {.payload_bytes = kMiB});
      writer.write({.extents = {{0, kMiB, source.data()}}});
      if (op != "unlink") writer.commit({});
    });
    if (!fs_->wait_until_held(op, "*")) ADD_FAILURE() << op;
    SCOPED_TRACE(op);
    expect_that_others_go_on();
    fs_->release();
    EXPECT_NO_THROW(stored.get());
  }
}

// Its memory's pages come from a file that hangs. Other loads of "small" itself wait for the thread that has opened it.
TEST_P(HangTest, ACancelledSmallLoadEndsWhenNobodyWritesIntoItsMemoryAnyMore) {
  testing::write_file(dir_ / "small", std::span(bytes_).first(4096));
  const testing::HeldInCache held(dir_ / "small");
  const int fd = ::open((*fs_ / "stuck").c_str(), O_RDONLY | O_CLOEXEC);
  void* const memory = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
  ::close(fd);
  ASSERT_NE(memory, MAP_FAILED);
  fs_->hold("read", "stuck");
  Transfer transfer = engine_->start_load({.files = {{.path = dir_ / "small", .extents = {{0, 4096, memory}}}}});
  EXPECT_TRUE(fs_->wait_until_held("read", "stuck"));
  transfer.cancel();
  expect_that_others_go_on();
  EXPECT_FALSE(transfer.wait_for(std::chrono::seconds(0)));
  fs_->release();
  EXPECT_TRUE(transfer.wait_for(kHang));
  EXPECT_EQ(transfer.error(), Errc::kCancelled);
  ::munmap(memory, 4096);
}

// Workers copy from and to memory whose pages come from a file that hangs.
TEST_P(HangTest, MemoryThatIsAMapOfAFileThatHangsHoldsUpNoLoadOfAnotherFile) {
  constexpr std::size_t kOdd = 8;  // Neither address fits direct I/O, so that all bytes go through slots.
  const std::size_t size = bytes_.size() - kOdd;
  testing::write_file(dir_ / "mapped to", bytes_);
  const int fd = ::open((*fs_ / "stuck").c_str(), O_RDONLY | O_CLOEXEC);
  for (const bool is_load : {true, false}) {
    void* const mapped = ::mmap(nullptr, bytes_.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    ASSERT_NE(mapped, MAP_FAILED);
    ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    std::byte* const memory = static_cast<std::byte*>(mapped) + kOdd;
    fs_->hold("read", "stuck");
    auto ended = std::async(std::launch::async, [&] {
      if (is_load) {
        FileExtents file{.path = dir_ / "mapped to", .extents = {{0, size, memory}}};
        return engine_->start_load({.files = {file}, .cache = CachePolicy::kDirect}).wait(), true;
      }
      FileWriter writer = engine_->create(dir_ / "new", {.payload_bytes = size});
      return writer.write({.extents = {{0, size, memory}}}), writer.commit({}), true;
    });
    EXPECT_TRUE(fs_->wait_until_held("read", "stuck"));
    SCOPED_TRACE(is_load);
    expect_that_others_keep_going_on();
    fs_->release();
    EXPECT_TRUE(ended.get());
    if (is_load) {
      EXPECT_TRUE(testing::same_bytes(memory, bytes_.data(), size));
    } else {
      EXPECT_TRUE(testing::file_has(dir_ / "new", std::span(bytes_).subspan(kOdd)));
    }
    ::munmap(mapped, bytes_.size());
  }
  ::close(fd);
}

TEST_P(HangTest, ABufferedLoadGoesOnThoughTheFileThatHadItsDescriptorDoesNotClose) {
  fs_->hold("flush", "stuck");
  for (const auto& path : {*fs_ / "stuck", dir_ / "other"}) {
    Load& load = loads_.emplace_back();
    load.memory = std::make_unique<GuardedMemory>(bytes_.size());
    load.transfer = engine_->start_load(request(path, *load.memory, CachePolicy::kBuffered));
    EXPECT_EQ(outcome(load), std::error_code());
    EXPECT_TRUE(right(load));
  }
  fs_->release();
}

TEST_P(HangTest, ManyOpenFilesWhoseReadsHangHoldUpNoOtherLoad) {
  constexpr int kFiles = 60;
  fs_->hold("read", "*");
  for (int i = 0; i < kFiles; ++i) {
    const auto path = *fs_ / std::to_string(i);
    testing::write_file(path, std::span(bytes_).first(4096));
    Load& load = loads_.emplace_back();
    load.memory = std::make_unique<GuardedMemory>(4096);
    load.transfer = engine_->start_load(request(path, *load.memory));
  }
  ASSERT_TRUE(fs_->wait_until_held("read", "*", GetParam() == Backend::kWorkers ? 1 : kDepth));
  expect_that_others_go_on();
  fs_->release();
  for (Load& load : loads_) {
    const std::error_code ended = outcome(load);
    EXPECT_TRUE(!ended || ended == Errc::kDeadlineExceeded) << ended.message();
  }
}

TEST_P(HangTest, FilesWhoseReadsThroughSlotsHangHoldUpNoOtherLoad) {
  start_files_that_hang();
  expect_that_others_keep_going_on();
  fs_->release();
}

// Slots for such chunks are populated by workers before their first read.
TEST_P(HangTest, FilesWhoseReadsThroughFreshSlotsHangHoldUpNoOtherLoad) {
  engine_.reset();
  engine_ = std::make_unique<Engine>(EngineOptions{.chunk_bytes = 2 * kMiB,
                                                   .queue_depth = kDepth / 2,
                                                   .staging_bytes = 2 * kDepth * kMiB,
                                                   .workers = 4,
                                                   .backend = GetParam()});
  start_files_that_hang();
  expect_that_others_keep_going_on();
  fs_->release();
}

TEST_P(HangTest, AReadThatHangsHoldsUpNoOtherLoadThoughThereAreTwoSlots) {
  engine_.reset();
  engine_ = std::make_unique<Engine>(EngineOptions{.chunk_bytes = kMiB,
                                                   .queue_depth = kDepth,
                                                   .staging_bytes = 2 * kMiB,
                                                   .workers = kWorkers,
                                                   .backend = GetParam()});
  fs_->hold("read", "stuck");
  start(*fs_ / "stuck", 64);
  ASSERT_TRUE(fs_->wait_until_held("read", "stuck"));
  expect_that_others_keep_going_on();
  fs_->release();
}

TEST_P(HangTest, ADescriptorThatALoadDoesNotComeToUseHoldsUpNoOtherLoadWhenItDoesNotClose) {
  const int fd = ::open((*fs_ / "stuck").c_str(), O_RDONLY | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  fs_->hold("flush", "stuck");
  GuardedMemory memory(bytes_.size());
  LoadRequest expired = request(dir_ / "other", memory);
  expired.files.front().fd = fd;
  expired.deadline = std::chrono::steady_clock::now() - std::chrono::seconds(1);
  Transfer transfer = engine_->start_load(expired);
  transfer.detach();
  expect_that_others_go_on();
  fs_->release();
  ::close(fd);
}

TEST_P(HangTest, ADescriptorThatDoesNotCloseHoldsUpNoUnusedOneOfAnotherFileSystem) {
  const UniqueFd stuck(::open((*fs_ / "stuck").c_str(), O_RDONLY | O_CLOEXEC));
  const UniqueFd other(::open((dir_ / "other").c_str(), O_RDONLY | O_CLOEXEC));
  GuardedMemory memory(bytes_.size());
  const auto expect_that_no_load_uses = [&](const UniqueFd& fd) {
    LoadRequest expired = request("a name for messages", memory);
    expired.files.front().fd = fd.get();
    expired.deadline = std::chrono::steady_clock::now() - std::chrono::seconds(1);
    Transfer transfer = engine_->start_load(expired);
    ASSERT_TRUE(transfer.wait_for(kHang));
    EXPECT_EQ(transfer.error(), Errc::kDeadlineExceeded);
  };
  fs_->hold("getattr", "stuck");
  fs_->hold("flush", "stuck");
  expect_that_no_load_uses(stuck);
  ASSERT_TRUE(fs_->wait_until_held("flush", "stuck"));
  expect_that_others_keep_going_on();  // Until the engine knows that the thread is late, and longer.
  expect_that_no_load_uses(other);
  const Deadline deadline = std::chrono::steady_clock::now() + kHang;
  while (testing::open_descriptors_of(dir_ / "other") > 1 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::yield();
  EXPECT_EQ(testing::open_descriptors_of(dir_ / "other"), 1) << "that of this test";
  fs_->release();
}

TEST_P(HangTest, ADescriptorThatHangsHoldsUpNoLoadOfAnotherDescriptorThatIsCalledTheSame) {
  const internal::UniqueFd stuck(::open((*fs_ / "stuck").c_str(), O_RDONLY | O_CLOEXEC));
  const internal::UniqueFd other(::open((dir_ / "other").c_str(), O_RDONLY | O_CLOEXEC));
  const auto start_load_of = [&](const internal::UniqueFd& fd) -> Load& {
    Load& load = loads_.emplace_back();
    load.memory = std::make_unique<GuardedMemory>(bytes_.size());
    LoadRequest wanted = request("a name for messages", *load.memory);
    wanted.files.front().fd = fd.get();
    load.transfer = engine_->start_load(wanted);
    return load;
  };
  fs_->hold("getattr", "stuck");
  start_load_of(stuck);
  ASSERT_TRUE(fs_->wait_until_held("getattr", "stuck"));
  // Until the engine knows that the thread of the first load is late, and longer.
  const Deadline enough = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  while (std::chrono::steady_clock::now() < enough) {
    ASSERT_EQ(outcome(start_load_of(other)), std::error_code());
    loads_.pop_back();
  }
  fs_->release();
}

}  // namespace
}  // namespace flashpack
