#include "engine/steps.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <memory>
#include <string>
#include <vector>

#include "engine/ground/host_region.h"
#include "engine/transfer_state.h"
#include "tests/support/scripted_queue.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

using Route = Steps::Route;
using flashpack::testing::ScriptedQueue;

constexpr std::uint32_t kChunk = 4u << 20;

class StepsTest : public ::testing::Test, private Steps::Owner {
 protected:
  StepsTest() {
    testing::write_file(dir_ / "file", std::vector<std::byte>(3 * kChunk));
    part_.transfer = transfer_.get();
    part_.planned = std::make_unique<PlannedFile>(
        PlannedFile{.open = FileUse(File::open(dir_ / "file", std::nullopt, true), &disk_)});
    part_.place.file_system = &file_system_;
    part_.place.state = Part::State::kOpen;
  }

  void plan(std::vector<Fragment> extents, CachePolicy policy = CachePolicy::kDirect) {
    part_.planned->plan = Plan::of_load(std::move(extents), kChunk, kPageBytes);
    part_.planned->router = Router(part_.plan(), part_.file(), policy);
    part_.chunks_open = static_cast<std::uint32_t>(part_.plan().chunks.size());
  }
  // One chunk that goes through a slot, of blocks 1 and 2 of the file.
  void plan_small() { plan({{5000, 6000, memory_.data() + 1}}); }

  bool set_out(Route route, std::size_t chunk = 0) {
    return steps_.set_out(part_, part_.plan().chunks.at(chunk), route);
  }

  // Ends the last operation that was pushed to `queue`, and lets the chunks go on.
  template <class Interface>
  void end(ScriptedQueue<Interface>& queue, std::int64_t result) {
    queue.ended.push_back({queue.pushed.back().tag, result});
    steps_.reap(std::chrono::nanoseconds(0));
  }

  void on_delivered(Part&, const Chunk&) override { told_.push_back("delivered"); }
  void on_given_back(Part&) override { told_.push_back("given back"); }
  void on_failed(Part&, const Error& error) override { told_.push_back(error.what()); }
  void on_came_back(Part&) override { told_.push_back("came back"); }

  testing::TempDir dir_;
  HostRegion memory_{2 * kChunk, "a test"};
  HostRegion slots_{2 * kChunk, "a test"};
  ScriptedQueue<DiskQueue> disk_;
  ScriptedQueue<WorkQueue> workers_;
  FileSystem::Totals totals_;
  FileSystem file_system_{totals_};
  std::shared_ptr<TransferState> transfer_ = std::make_shared<TransferState>();
  Part& part_ = transfer_->driver.parts.emplace_back(PartRequest{.path = "the file"});
  std::vector<std::string> told_;
  Steps steps_{*this,
               Queues{.disk = disk_, .stand_in = disk_, .workers = workers_},
               nullptr,
               {slots_.bytes().first(kChunk), slots_.bytes().subspan(kChunk, kChunk)},
               Jobs::Limits{.tags = 8 + Jobs::kStuckLimit, .queue_depth = 4, .slots = 2},
               {.depth = 1}};
};

using Told = std::vector<std::string>;

TEST_F(StepsTest, AChunkInPlaceIsPopulatedIfItsMemoryIsFreshThenReadAndDelivered) {
  plan({{0, kChunk, memory_.data()}});
  ASSERT_TRUE(set_out(Route::kDirect));
  ASSERT_EQ(workers_.pushed.size(), 1u);
  EXPECT_EQ(workers_.pushed[0].request.op, ByteWork::Op::kPopulate);
  EXPECT_TRUE(disk_.pushed.empty());
  end(workers_, 0);
  ASSERT_EQ(disk_.pushed.size(), 1u);
  EXPECT_EQ(disk_.pushed[0].request.memory.data(), memory_.data());
  EXPECT_EQ(disk_.pushed[0].request.memory.size(), kChunk);
  EXPECT_TRUE(told_.empty());
  end(disk_, kChunk);
  EXPECT_EQ(told_, Told{"delivered"});
  EXPECT_TRUE(steps_.idle());
  EXPECT_EQ(transfer_->done_bytes, kChunk);
  EXPECT_EQ(transfer_->driver.stats.direct_bytes, kChunk);
  EXPECT_EQ(transfer_->driver.stats.staged_bytes, 0u);

  std::fill_n(memory_.data(), kChunk, std::byte{1});
  ASSERT_TRUE(set_out(Route::kDirect));
  EXPECT_EQ(workers_.pushed.size(), 1u) << "the memory is there";
  end(disk_, kChunk);
}

TEST_F(StepsTest, AFreshSlotIsPopulatedByAWorkerBeforeItsFirstLargeRead) {
  for (const std::uint32_t size_bytes : {kChunk / 2, kChunk}) {
    plan({{0, size_bytes, memory_.data() + 1}});
    ASSERT_TRUE(set_out(Route::kDirect));
    ASSERT_EQ(workers_.pushed.size(), 1u);
    EXPECT_EQ(workers_.pushed[0].request.op, ByteWork::Op::kPopulate);
    EXPECT_EQ(workers_.pushed[0].request.touch, ByteWork::Touch::kForWriting);
    EXPECT_EQ(workers_.pushed[0].request.view.bytes.data(), slots_.data());
    EXPECT_EQ(workers_.pushed[0].request.view.bytes.size(), size_bytes);
    EXPECT_FALSE(steps_.has_room(Route::kDirect, 1)) << "the disk will have it";
    end(workers_, 0);
    EXPECT_FALSE(steps_.has_room(Route::kDirect, 1));
    end(disk_, size_bytes);
    EXPECT_EQ(workers_.pushed.back().request.op, ByteWork::Op::kScatter);
    end(workers_, 0);
    workers_.pushed.clear();
  }
  ASSERT_TRUE(set_out(Route::kDirect));
  EXPECT_TRUE(workers_.pushed.empty()) << "the slot has had as many bytes";
  end(disk_, kChunk);
  end(workers_, 0);
}

TEST_F(StepsTest, ASlotWhosePopulatingWasCancelledIsStillFresh) {
  plan({{0, kChunk, memory_.data() + 1}});
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(set_out(Route::kDirect));
    ASSERT_EQ(workers_.pushed.size(), 1u);
    part_.failure = Failure(Error(Errc::kCancelled, "read"));
    steps_.abandon_chunks_of(part_);
    end(workers_, -ECANCELED);
    EXPECT_TRUE(steps_.idle());
    part_.failure = {};
    workers_.pushed.clear();
  }
}

TEST_F(StepsTest, WorkersGatherAFewChunksAtATime) {
  const auto store = std::make_shared<TransferState>(TransferRequest{.direction = Direction::kStore});
  part_.transfer = store.get();
  part_.planned->plan = Plan::of_store({{0, 2 * kChunk, memory_.data() + 1}}, kChunk, {});
  ASSERT_TRUE(set_out(Route::kDirect, 0));
  ASSERT_EQ(workers_.pushed.size(), 1u);
  EXPECT_EQ(workers_.pushed[0].request.op, ByteWork::Op::kGather);
  EXPECT_FALSE(steps_.has_room(Route::kDirect, 1)) << "the disk will have it";
  EXPECT_FALSE(set_out(Route::kDirect, 1)) << "one is gathered at a time";
  end(workers_, 0);
  ASSERT_EQ(disk_.pushed.size(), 1u);
  EXPECT_FALSE(steps_.has_room(Route::kDirect, 1));
  EXPECT_TRUE(steps_.has_room(Route::kDirect, 2));
  ASSERT_TRUE(set_out(Route::kDirect, 1));
  EXPECT_EQ(workers_.pushed.size(), 2u);
  end(disk_, kChunk);
  end(workers_, 0);
  end(disk_, kChunk);
  EXPECT_EQ(told_, (Told{"delivered", "delivered"}));
}

TEST_F(StepsTest, AShortReadGoesOnAtItsLastWholeBlock) {
  plan_small();
  ASSERT_TRUE(set_out(Route::kDirect));
  EXPECT_EQ(disk_.pushed[0].request.offset_bytes, kPageBytes);
  EXPECT_EQ(disk_.pushed[0].request.memory.size(), 2 * kPageBytes);
  end(disk_, 5000);
  ASSERT_EQ(disk_.pushed.size(), 2u);
  EXPECT_EQ(disk_.pushed[1].request.offset_bytes, 2 * kPageBytes);
  EXPECT_EQ(disk_.pushed[1].request.memory.size(), kPageBytes);
  EXPECT_EQ(transfer_->driver.stats.retries, 1u);
  end(disk_, kPageBytes);
  ASSERT_EQ(workers_.pushed.size(), 1u);
  EXPECT_EQ(workers_.pushed[0].request.op, ByteWork::Op::kScatter);
  end(workers_, 0);
  EXPECT_EQ(told_, Told{"delivered"});
  EXPECT_EQ(transfer_->done_bytes, 6000u);
}

TEST_F(StepsTest, AReadIsTriedAgainABoundedNumberOfTimes) {
  for (const auto& [result, cause] : {std::pair{-EAGAIN, "Resource temporarily unavailable"},
                                      std::pair{100, "short read: the file ends before the requested bytes"}}) {
    told_.clear();
    plan_small();
    ASSERT_TRUE(set_out(Route::kDirect));
    for (int i = 0; i < 1000 && told_.empty(); ++i) end(disk_, result);
    EXPECT_EQ(told_, Told{std::string("read the file at 5000+6000: ") + cause});
    EXPECT_TRUE(steps_.idle());
  }
}

TEST_F(StepsTest, AnErrorAndAnEarlyEndFailThePart) {
  for (const auto& [result, cause] :
       {std::pair{-EIO, "Input/output error"}, std::pair{0, "short read: the file ends before the requested bytes"}}) {
    told_.clear();
    plan_small();
    ASSERT_TRUE(set_out(Route::kDirect));
    end(disk_, result);
    EXPECT_EQ(told_, Told{std::string("read the file at 5000+6000: ") + cause});
    EXPECT_TRUE(steps_.idle());
  }
}

TEST_F(StepsTest, WhereDirectReadsAreRefusedTheChunkGoesThroughThePageCache) {
  plan_small();
  ASSERT_TRUE(set_out(Route::kDirect));
  end(disk_, -EINVAL);
  ASSERT_EQ(workers_.pushed.size(), 1u);
  EXPECT_EQ(workers_.pushed[0].request.op, ByteWork::Op::kFromCache);
  EXPECT_FALSE(workers_.pushed[0].request.page_cache.only);
  EXPECT_FALSE(part_.planned->router.direct());
  EXPECT_EQ(transfer_->driver.stats.fallback_reason, "direct I/O: refused by the file system at the first use");
  end(workers_, 6000);
  EXPECT_EQ(told_, Told{"delivered"});
  EXPECT_EQ(transfer_->driver.stats.buffered_bytes, 6000u);
}

TEST_F(StepsTest, AChunkThatIsNotCachedAfterAllGoesBackToTheRouter) {
  if (part_.file().direct_fd() < 0) GTEST_SKIP() << "no direct I/O here";
  plan({{5000, 6000, memory_.data() + 1}}, CachePolicy::kAuto);
  unsigned questions = 10;
  const Chunk* chunk = part_.planned->router.find_next(Router::List::kThroughCache, questions);
  const auto list = chunk ? Router::List::kThroughCache : Router::List::kPastCache;
  ASSERT_TRUE(chunk || part_.planned->router.find_next(list, questions));
  ASSERT_TRUE(set_out(Route::kSeemsCached));
  part_.planned->router.take(list);
  EXPECT_TRUE(part_.planned->router.exhausted());
  end(workers_, -EAGAIN);
  EXPECT_EQ(told_, Told{"given back"});
  EXPECT_TRUE(steps_.idle());
  EXPECT_EQ(part_.planned->router.find_next(Router::List::kPastCache, questions), &part_.plan().chunks[0]);
}

TEST_F(StepsTest, ChunksOfAFailedPartComeBackWhenTheirOperationsDo) {
  plan({{5000, 6000, memory_.data() + 1}, {kChunk + 5000, 6000, memory_.data() + 8001}});
  ASSERT_TRUE(set_out(Route::kDirect, 0));
  ASSERT_TRUE(set_out(Route::kDirect, 1));
  part_.failure = Failure(Error(Errc::kCancelled, "read"));
  steps_.abandon_chunks_of(part_);
  EXPECT_EQ(disk_.cancelled.size(), 2u);
  EXPECT_TRUE(told_.empty());
  disk_.ended = {{disk_.pushed[0].tag, -ECANCELED}};
  steps_.reap(std::chrono::nanoseconds(0));
  EXPECT_EQ(told_, Told{"came back"});
  EXPECT_FALSE(steps_.idle());
  end(disk_, 2 * kPageBytes);
  EXPECT_EQ(told_, (Told{"came back", "came back"})) << "what was read is of no use";
  EXPECT_TRUE(steps_.idle());
  EXPECT_EQ(transfer_->done_bytes, 0u);
}

TEST_F(StepsTest, APartThatHasFailedMayHaveReadThroughThePageCache) {
  plan({{5000, 6000, memory_.data() + 1}, {kChunk + 5000, 6000, memory_.data() + 8001}});
  part_.failure = Failure(Error(Errc::kCancelled, "read"));
  ASSERT_TRUE(set_out(Route::kDirect, 0));
  steps_.abandon_chunks_of(part_);
  EXPECT_FALSE(part_.has_used_page_cache);
  end(disk_, -ECANCELED);
  ASSERT_TRUE(set_out(Route::kBuffered, 1));
  steps_.abandon_chunks_of(part_);
  EXPECT_TRUE(part_.has_used_page_cache);
  end(workers_, -ECANCELED);
  EXPECT_TRUE(steps_.idle());
}

TEST_F(StepsTest, AChunkSetsOutOnlyIfThereIsRoomForIt) {
  plan({{5000, 6000, memory_.data() + 1},
        {kChunk + 5000, 6000, memory_.data() + 8001},
        {2 * kChunk + 5000, 6000, memory_.data() + 16001}});
  ASSERT_TRUE(set_out(Route::kBuffered, 0));
  EXPECT_FALSE(steps_.has_room(Route::kBuffered, 2)) << "the workers have enough";
  EXPECT_FALSE(steps_.has_room(Route::kSeemsCached, 2));
  EXPECT_TRUE(steps_.has_room(Route::kDirect, 2));
  end(workers_, 6000);
  EXPECT_TRUE(steps_.has_room(Route::kBuffered, 2));
  ASSERT_TRUE(set_out(Route::kDirect, 0));
  EXPECT_TRUE(steps_.has_room(Route::kDirect, 2));
  ASSERT_TRUE(set_out(Route::kDirect, 1));
  EXPECT_FALSE(steps_.has_room(Route::kDirect, 2));
  EXPECT_TRUE(steps_.has_room(Route::kBuffered, 2));
  EXPECT_FALSE(set_out(Route::kDirect, 2)) << "both slots are in use";
  EXPECT_EQ(part_.jobs, 2u);
  part_.failure = Failure(Error(Errc::kCancelled, "read"));
  steps_.abandon_chunks_of(part_);
  disk_.ended = {{disk_.pushed[0].tag, -ECANCELED}, {disk_.pushed[1].tag, -ECANCELED}};
  steps_.reap(std::chrono::nanoseconds(0));
  EXPECT_TRUE(steps_.idle());
}

}  // namespace
}  // namespace flashpack::internal
