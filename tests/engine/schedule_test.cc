#include "engine/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "engine/ground/host_region.h"
#include "engine/transfer_state.h"
#include "tests/support/scripted_queue.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

using flashpack::testing::ScriptedQueue;

constexpr std::uint32_t kChunk = 1u << 20;
constexpr std::uint32_t kQueueDepth = 3;

class ScheduleTest : public ::testing::Test, private Steps::Owner {
 protected:
  ScheduleTest() {
    testing::write_file(dir_ / "file", std::vector<std::byte>(8 * kChunk));
    std::ranges::fill(memory_.bytes(),
                      std::byte{1});  // Memory that is there, so that a chunk goes to the disk at once.
  }

  // A part of so many chunks, which are read past the page cache.
  Part& part(std::uint64_t turn, std::size_t chunks) {
    Part& part = transfer_->driver.parts.emplace_back();
    part.transfer = transfer_.get();
    part.turn = turn;
    part.planned = std::make_unique<PlannedFile>(
        PlannedFile{.open = FileUse(File::open(dir_ / "file", std::nullopt, true), &disk_)});
    part.place.file_system = &file_system_;
    part.place.state = Part::State::kOpen;
    part.planned->plan = Plan::of_load({{0, chunks * kChunk, memory_.data()}}, kChunk, kPageBytes);
    part.planned->router = Router(part.plan(), part.file(), CachePolicy::kDirect);
    part.chunks_open = static_cast<std::uint32_t>(chunks);
    return part;
  }

  // How many chunks of the part are under way.
  static std::vector<std::uint32_t> under_way(const std::vector<Part*>& parts) {
    std::vector<std::uint32_t> jobs;
    for (const Part* const part : parts) jobs.push_back(part->jobs);
    return jobs;
  }

  void end_oldest() {
    disk_.ended.push_back({disk_.pushed.front().tag, kChunk});
    disk_.pushed.erase(disk_.pushed.begin());
    steps_.reap(std::chrono::nanoseconds(0));
  }

  void on_delivered(Part& part, const Chunk&) override { --part.chunks_open; }
  void on_given_back(Part&) override { FAIL(); }
  void on_failed(Part&, const Error& error) override { FAIL() << error.what(); }
  void on_came_back(Part&) override { FAIL(); }

  testing::TempDir dir_;
  HostRegion memory_{8 * kChunk, "a test"};
  HostRegion slot_{kChunk, "a test"};
  ScriptedQueue<DiskQueue> disk_;
  ScriptedQueue<WorkQueue> workers_;
  FileSystem::Totals totals_;
  FileSystem file_system_{totals_};
  std::shared_ptr<TransferState> transfer_ = std::make_shared<TransferState>();
  Steps steps_{*this,
               Queues{.disk = disk_, .stand_in = disk_, .workers = workers_},
               nullptr,
               {slot_.bytes()},
               Jobs::Limits{.tags = 8 + Jobs::kStuckLimit, .queue_depth = kQueueDepth, .slots = 1},
               {.depth = 1}};
  Schedule schedule_{kQueueDepth, kChunk};
};

TEST_F(ScheduleTest, ChunksStartInTheOrderOfTheTurnsUntilTheDiskIsBusy) {
  Part& second = part(2, 2);
  Part& first = part(1, 2);
  schedule_.add(second);
  schedule_.add(first);
  EXPECT_FALSE(schedule_.start_chunks(steps_));
  EXPECT_EQ(under_way({&first, &second}), (std::vector{2u, 1u}));
  end_oldest();
  EXPECT_FALSE(schedule_.start_chunks(steps_));
  EXPECT_EQ(under_way({&first, &second}), (std::vector{1u, 2u}));
}

TEST_F(ScheduleTest, AStoreHasOnePlaceMoreForTheChunkThatIsGatheredMeanwhile) {
  const auto store = std::make_shared<TransferState>(TransferRequest{.direction = Direction::kStore});
  Part& written = part(1, 6);
  Part& read = part(2, 2);
  written.transfer = store.get();
  written.planned->plan = Plan::of_store({{0, 6 * kChunk, memory_.data()}}, kChunk, {});
  schedule_.add(written);
  schedule_.add(read);
  schedule_.start_chunks(steps_);
  EXPECT_EQ(under_way({&written, &read}), (std::vector{kQueueDepth + 1, 0u}));
}

TEST_F(ScheduleTest, SmallPartsGoFirstAndLeaveOnePlaceToLargeOnes) {
  Part& large = part(1, 4);
  schedule_.add(large);
  std::vector<Part*> small;
  for (std::uint64_t turn = 2; turn < 6; ++turn) schedule_.add(*small.emplace_back(&part(turn, 1)));
  schedule_.start_chunks(steps_);
  EXPECT_EQ(under_way(small), (std::vector{1u, 1u, 0u, 0u}));
  EXPECT_EQ(large.jobs, 1u);
}

TEST_F(ScheduleTest, SmallPartsHaveTheWholeDepthIfNothingElseWaits) {
  std::vector<Part*> small;
  for (std::uint64_t turn = 0; turn < 4; ++turn) schedule_.add(*small.emplace_back(&part(turn, 1)));
  schedule_.start_chunks(steps_);
  EXPECT_EQ(under_way(small), (std::vector{1u, 1u, 1u, 0u}));
}

TEST_F(ScheduleTest, APartIsHereFromAddUntilItsLastChunkHasStarted) {
  Part& one = part(1, 2);
  schedule_.add(one);
  schedule_.add(one);
  EXPECT_TRUE(schedule_.has(one));
  schedule_.start_chunks(steps_);
  EXPECT_FALSE(schedule_.has(one)) << "all of its chunks are under way";
  EXPECT_EQ(one.jobs, 2u) << "it was added once";
}

TEST_F(ScheduleTest, NoChunkOfAPartStartsThatHasBeenRemoved) {
  Part& failed = part(1, 2);
  Part& other = part(2, 2);
  schedule_.add(failed);
  schedule_.add(other);
  schedule_.remove(failed);
  schedule_.start_chunks(steps_);
  EXPECT_EQ(under_way({&failed, &other}), (std::vector{0u, 2u}));
}

}  // namespace
}  // namespace flashpack::internal
