#include "engine/pipeline.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/pipeline_rig.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

using flashpack::testing::GuardedMemory;
using Rig = flashpack::testing::PipelineRig;
using flashpack::testing::TempDir;

constexpr std::uint32_t kChunk = 1u << 20;

class PipelineTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    dir_ = std::make_unique<TempDir>();
    bytes_ = flashpack::testing::random_bytes(6 * kChunk + 777);
    flashpack::testing::write_file(path(), bytes_);
  }
  static void TearDownTestSuite() { dir_.reset(); }

  static std::filesystem::path path() { return *dir_ / "file"; }

  static bool right(const GuardedMemory& memory, std::uint64_t offset) {
    return memory.intact() && testing::same_bytes(memory.data(), bytes_.data() + offset, memory.size());
  }

  static std::unique_ptr<TempDir> dir_;
  static std::vector<std::byte> bytes_;
};

std::unique_ptr<TempDir> PipelineTest::dir_;
std::vector<std::byte> PipelineTest::bytes_;

struct Wanted {
  std::uint64_t offset;
  std::unique_ptr<GuardedMemory> memory;
};

std::vector<Wanted> random_wanted(std::mt19937_64& random, std::uint64_t file_bytes) {
  std::vector<Wanted> wanted;
  for (auto n = 1 + random() % 4; n > 0; --n) {
    const std::uint64_t offset = random() % file_bytes;
    const std::uint64_t limit = random() % 3 ? 20'000 : 3 * kChunk;
    const std::uint64_t size = std::min(1 + random() % limit, file_bytes - offset);
    const std::size_t phase = random() % 2 ? offset % 4096 : random() % 4096;
    wanted.push_back({offset, std::make_unique<GuardedMemory>(size, phase)});
  }
  return wanted;
}

std::vector<Extent> extents_of(const std::vector<Wanted>& wanted) {
  std::vector<Extent> extents;
  for (const Wanted& w : wanted) extents.push_back({w.offset, w.memory->size(), w.memory->data()});
  return extents;
}

TEST_F(PipelineTest, ShortReadsInterruptsAndRefusalsStillDeliverTheRightBytes) {
  for (unsigned seed = 0; seed < 40; ++seed) {
    std::mt19937_64 random(seed);
    Rig rig(seed, {.short_percent = 40, .interrupt_percent = 20, .refuse_percent = seed % 4 == 0 ? 5 : 0});
    for (int round = 0; round < 3; ++round) {
      const auto wanted = random_wanted(random, bytes_.size());
      rig.start({.path = path(), .extents = extents_of(wanted)}).wait();
      for (const Wanted& w : wanted) ASSERT_TRUE(right(*w.memory, w.offset)) << "seed " << seed << " at " << w.offset;
    }
  }
}

TEST_F(PipelineTest, ErrorsEndInRightBytesOrACleanError) {
  int failed = 0;
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937_64 random(seed);
    Rig rig(seed, {.short_percent = 20, .interrupt_percent = 10, .error_percent = 8});
    std::vector<std::vector<Wanted>> wanted;
    std::vector<Transfer> transfers;
    for (int i = 0; i < 3; ++i) {
      wanted.push_back(random_wanted(random, bytes_.size()));
      transfers.push_back(rig.start({.path = path(), .extents = extents_of(wanted.back())}));
    }
    for (std::size_t i = 0; i < transfers.size(); ++i) {
      try {
        transfers[i].wait();
        for (const Wanted& w : wanted[i]) ASSERT_TRUE(right(*w.memory, w.offset));
      } catch (const Error& error) {
        ++failed;
        EXPECT_EQ(error.code(), std::errc::io_error) << error.what();
        EXPECT_EQ(error.path(), path());
        EXPECT_LT(error.offset_bytes(), bytes_.size());
      }
      for (const Wanted& w : wanted[i]) EXPECT_TRUE(w.memory->intact());
      EXPECT_EQ(transfers[i].progress().outstanding, 0u);
    }
    rig.stop();
    EXPECT_TRUE(rig.idle());
  }
  EXPECT_GT(failed, 0);
}

TEST_F(PipelineTest, ADiskThatOnlyInterruptsIsAnErrorInTheEnd) {
  Rig rig(1, {.interrupt_percent = 100});
  GuardedMemory memory(10'000);
  try {
    rig.start({.path = path(), .extents = {{0, memory.size(), memory.data()}}}).wait();
    FAIL() << "a load without a single byte read succeeded";
  } catch (const Error& error) {
    EXPECT_TRUE(error.code() == std::errc::interrupted || error.code() == std::errc::resource_unavailable_try_again);
  }
}

TEST_F(PipelineTest, QueueDepthIsKeptAndReached) {
  Rig rig(1, {});
  GuardedMemory memory(6 * kChunk);
  rig.start({.path = path(), .extents = {{0, memory.size(), memory.data()}}}).wait();
  rig.stop();
  // Fresh memory is populated on the way, which may put a chunk more on the disk for every worker.
  EXPECT_GE(rig.disk().max_in_flight(), 2u);
  EXPECT_LE(rig.disk().max_in_flight(), 2 * Rig::kQueueDepth);
}

TEST_F(PipelineTest, CancelledTransfersLeaveTheOthersAlone) {
  for (unsigned seed = 0; seed < 30; ++seed) {
    std::mt19937_64 random(seed);
    Rig rig(seed, {.short_percent = 30});
    auto doomed = random_wanted(random, bytes_.size());
    const auto kept = random_wanted(random, bytes_.size());
    Transfer first = rig.start({.path = path(), .extents = extents_of(doomed)});
    Transfer second = rig.start({.path = path(), .extents = extents_of(kept)});
    first.cancel();
    try {
      first.wait();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kCancelled);
    }
    for (const Wanted& w : doomed) EXPECT_TRUE(w.memory->intact());
    doomed.clear();  // Unmapped: a read that is still under way would fault or fail.
    second.wait();
    for (const Wanted& w : kept) EXPECT_TRUE(right(*w.memory, w.offset));
  }
}

struct CountingCompletion final : Completion {
  void done(Transfer& transfer) noexcept override {
    try {
      bytes = transfer.wait().requested_bytes;
    } catch (const Error& error) {
      code = error.code();
    }
    ++calls;
  }
  std::atomic<int> calls = 0;
  std::uint64_t bytes = 0;
  std::error_code code;
};

TEST_F(PipelineTest, CompletionIsCalledOnceBeforeWaitReturns) {
  Rig rig(3, {.short_percent = 30});
  for (int i = 0; i < 50; ++i) {
    CountingCompletion completion;  // Dies right after wait(): it must not be called later.
    GuardedMemory memory(5000);
    Transfer transfer =
        rig.start({.path = path(), .extents = {{100, memory.size(), memory.data()}}, .completion = &completion});
    transfer.wait();
    EXPECT_EQ(completion.calls, 1);
  }
}

TEST_F(PipelineTest, CompletionSeesTheError) {
  Rig rig(3, {.error_percent = 100});
  CountingCompletion completion;
  GuardedMemory memory(5000);
  Transfer transfer =
      rig.start({.path = path(), .extents = {{100, memory.size(), memory.data()}}, .completion = &completion});
  EXPECT_THROW(transfer.wait(), Error);
  EXPECT_EQ(completion.calls, 1);
  EXPECT_EQ(completion.code, std::errc::io_error);
  EXPECT_THROW(transfer.wait(), Error) << "the same result again";
}

TEST_F(PipelineTest, ACancelThatCameBeforeTheDriverKnewTheTransferIsNotLost) {
  Rig rig(5, {});
  GuardedMemory memory(4 * kChunk);
  Transfer transfer = rig.start({.path = path(), .extents = {{0, memory.size(), memory.data()}}, .cancelled = true});
  try {
    transfer.wait();
    FAIL() << "a cancelled transfer ran to its end";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kCancelled);
  }
}

struct CallingCompletion final : Completion {
  void done(Transfer&) noexcept override { call(); }
  std::function<void()> call;
};

TEST_F(PipelineTest, ACompletionMayStartATransferWhileThePipelineIsClosing) {
  Rig rig(5, {});
  GuardedMemory memory(4 * kChunk);
  Transfer second;
  Transfer third;
  CallingCompletion close_and_start;
  CallingCompletion start_again;
  start_again.call = [&] { third = rig.start({.path = path(), .extents = {{0, memory.size(), memory.data()}}}); };
  close_and_start.call = [&] {
    second = rig.start({.path = path(),
                        .extents = {},
                        .completion = &start_again});  // Nothing to do: it ends as soon as it is admitted.
    rig.close();
  };
  Transfer first = rig.start({.path = path(), .extents = {}, .completion = &close_and_start});
  first.wait();
  rig.stop();
  EXPECT_TRUE(third.wait_for(std::chrono::nanoseconds(0)));
  EXPECT_TRUE(right(memory, 0));
}

TEST_F(PipelineTest, SmallTransfersAreReadAtTheSameTime) {
  Rig rig(5, {});
  std::vector<std::unique_ptr<GuardedMemory>> memory;
  std::vector<Transfer> transfers;
  CallingCompletion start_many;
  start_many.call = [&] {  // On the driver thread, so that it finds all of them at once.
    for (std::uint64_t i = 0; i < 6; ++i) {
      memory.push_back(std::make_unique<GuardedMemory>(150'000));  // In place: no slot is needed.
      transfers.push_back(
          rig.start({.path = path(), .extents = {{4096 * i, memory[i]->size() / 4096 * 4096, memory[i]->data()}}}));
    }
  };
  rig.start({.path = path(), .extents = {}, .completion = &start_many}).wait();
  for (Transfer& transfer : transfers) transfer.wait();
  rig.stop();
  EXPECT_GE(rig.disk().max_in_flight(), Rig::kQueueDepth);
}

TEST_F(PipelineTest, CloseFinishesThoughTheLastTransferNeverBegan) {
  for (int round = 0; round < 200; ++round) {
    GuardedMemory memory(1000);
    Rig rig(5, {});
    Transfer transfer = rig.start({.path = path(), .extents = {{0, memory.size(), memory.data()}}, .cancelled = true});
    rig.stop();
    EXPECT_THROW(transfer.wait(), Error);
  }
}

TEST_F(PipelineTest, CloseFinishesWhatWasStarted) {
  GuardedMemory memory(4 * kChunk);
  Rig rig(5, {.short_percent = 30});
  Transfer transfer = rig.start({.path = path(), .extents = {{0, memory.size(), memory.data()}}});
  rig.stop();
  EXPECT_TRUE(transfer.wait_for(std::chrono::nanoseconds(0)));
  EXPECT_TRUE(right(memory, 0));
}

}  // namespace
}  // namespace flashpack::internal
