#include "engine/jobs.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "engine/ground/host_region.h"
#include "engine/ground/target_pages.h"
#include "engine/transfer_state.h"
#include "tests/support/temp_dir.h"
#include "tests/support/trace_recorder.h"

namespace flashpack::internal {
namespace {

constexpr std::uint32_t kDepth = 4;
constexpr std::uint32_t kSlots = 6;
constexpr std::uint32_t kSpare = 8;
constexpr std::size_t kSlotBytes = 3 * 4096;

class JobsTest : public ::testing::Test {
 protected:
  /// The slots beyond `slots` are spare.
  explicit JobsTest(std::uint32_t slots = kSlots)
      : jobs_({.tags = kDepth + slots + Jobs::kStuckLimit, .queue_depth = kDepth, .slots = slots}, all_slots()) {}

  std::vector<std::span<std::byte>> all_slots() {
    std::vector<std::span<std::byte>> slots;
    for (std::size_t i = 0; i < kSlots + kSpare; ++i)
      slots.push_back(std::span(slots_).subspan(i * kSlotBytes, kSlotBytes));
    return slots;
  }

  // A load of one chunk, from a file of its own.
  struct Load {
    std::shared_ptr<TransferState> transfer;
    Part& part = transfer->driver.parts.emplace_back();
  };

  Load load(FileSystem& file_system, AfterLoad after = AfterLoad::kKeep, std::uint64_t total_bytes = 100,
            PagePolicy* page_policy = nullptr) {
    const std::filesystem::path path = dir_ / std::to_string(files_++);
    testing::write_file(path, std::vector<std::byte>(3 * 4096));
    Load load{.transfer = std::make_shared<TransferState>(
                  TransferRequest{.after = after, .total_bytes = total_bytes, .page_policy = page_policy})};
    load.part.transfer = load.transfer.get();
    load.part.planned =
        std::make_unique<PlannedFile>(PlannedFile{.open = FileUse(File::open(path, std::nullopt, false), nullptr)});
    load.part.place.file_system = &file_system;
    std::vector<Fragment> extents{{.offset_bytes = 5000, .size_bytes = 100, .memory = memory_.data()}};
    load.part.planned->plan = Plan::of_load(std::move(extents), 1 << 20, 4096);
    return load;
  }

  std::optional<unsigned> open(const Load& load, ChunkTraits::Route route = ChunkTraits::Route::kDirect) {
    const Chunk& chunk = load.part.plan().chunks.front();
    return jobs_.open(load.part, chunk, way_of(load.part, chunk, route));
  }

  // How many jobs the load gets, each of which has begun to read when the next one is asked for.
  std::size_t open_all(const Load& load, std::vector<unsigned>& tags, std::size_t limit = 1000,
                       Step step = Step::kRead) {
    std::size_t count = 0;
    for (; count < limit && jobs_.may_have_more(load.part); ++count) {
      const std::optional<unsigned> tag = open(load);
      if (!tag) break;
      jobs_.enter(jobs_[*tag], step, start_);
      tags.push_back(*tag);
    }
    return count;
  }

  void close_all(const std::vector<unsigned>& tags) {
    for (const unsigned tag : tags) jobs_.close(tag, start_);
  }

  testing::TempDir dir_;
  int files_ = 0;
  const Jobs::Time start_ = std::chrono::steady_clock::now();
  std::vector<std::byte> memory_ = std::vector<std::byte>(4096);
  std::vector<std::byte> slots_ = std::vector<std::byte>((kSlots + kSpare) * kSlotBytes);
  FileSystem::Totals totals_;
  FileSystem file_system_{totals_};
  FileSystem other_file_system_{totals_};
  Jobs jobs_;
};

class DeviceJobsTest : public JobsTest {
 protected:
  DeviceJobsTest() : JobsTest(kSlots + kSpare) {}
};

TEST_F(JobsTest, AJobThroughASlotCoversWholeBlocksAndGivesBackAllThatItTook) {
  const Load load = this->load(file_system_);
  const std::optional<unsigned> tag = open(load);
  ASSERT_TRUE(tag);
  Job& job = jobs_[*tag];
  EXPECT_EQ(load.part.jobs, 1u);
  EXPECT_EQ(load.transfer->outstanding, 1u);
  EXPECT_FALSE(jobs_.idle());
  jobs_.enter(job, Step::kRead, start_);
  EXPECT_EQ(jobs_.in(Step::kRead), 1u);
  const DiskRequest request = job.disk_request();
  EXPECT_EQ(request.op, DiskRequest::Op::kRead);
  EXPECT_EQ(request.offset_bytes, 4096u);
  EXPECT_EQ(request.memory.size(), 4096u);
  EXPECT_EQ(request.memory.data(), slots_.data() + static_cast<std::size_t>(job.slot) * kSlotBytes);
  jobs_.close(*tag, start_);
  EXPECT_EQ(jobs_.in(Step::kRead), 0u);
  EXPECT_EQ(load.part.jobs, 0u);
  EXPECT_EQ(load.transfer->outstanding, 0u);
  EXPECT_TRUE(jobs_.idle());
}

TEST_F(JobsTest, AnOperationThatGoesOnBeginsWhereTheLastOneEnded) {
  const Load load = this->load(file_system_);
  Job& job = jobs_[*open(load)];
  jobs_.enter(job, Step::kRead, start_);
  job.done_bytes = 512;
  const DiskRequest request = job.disk_request();
  EXPECT_EQ(request.offset_bytes, 4096u + 512);
  EXPECT_EQ(request.memory.size(), 4096u - 512);
  EXPECT_EQ(request.memory.data(), job.view.bytes.data() + 512);
  jobs_.close(0, start_);
}

TEST_F(JobsTest, EachStepOfABufferedWayHasItsWork) {
  const Load load = this->load(file_system_, AfterLoad::kDrop);
  Job& job = jobs_[*open(load, ChunkTraits::Route::kSeemsCached)];
  EXPECT_EQ(job.slot, -1);
  jobs_.enter(job, Step::kReadIfCached, start_);
  const ByteWork work = job.byte_work();
  EXPECT_EQ(work.op, ByteWork::Op::kFromCache);
  EXPECT_EQ(work.fd, load.part.file().buffered_fd());
  EXPECT_EQ(work.fragments.front().memory, memory_.data());
  EXPECT_TRUE(work.page_cache.only);
  EXPECT_TRUE(work.page_cache.drop);
  EXPECT_EQ(work.transfer, load.transfer.get());
  jobs_.enter(job, Step::kScatter, start_);
  EXPECT_EQ(job.way.view, View::kFragments);
  jobs_.close(0, start_);
}

TEST_F(JobsTest, NoMoreSlotsAreUsedThanAtATimeAndHalfOfThemBehindAGate) {
  struct Shut final : Gate {
    bool is_open(std::error_code&) noexcept override { return false; }
  };
  const Load gated = this->load(file_system_);
  gated.transfer->driver.gates.push_back(std::make_unique<Shut>());
  const Load other = this->load(file_system_);
  std::vector<unsigned> tags;
  EXPECT_EQ(open_all(gated, tags), kSlots / 2);
  EXPECT_EQ(open_all(other, tags), kSlots - kSlots / 2);
  const std::optional<unsigned> without_slot = open(other, ChunkTraits::Route::kBuffered);
  ASSERT_TRUE(without_slot);
  tags.push_back(*without_slot);
  close_all(tags);
  EXPECT_TRUE(jobs_.idle());
}

TEST_F(JobsTest, ALateJobMakesRoomInItsStepAndASpareSlotTakesThePlaceOfItsOwn) {
  const Load load = this->load(file_system_);
  std::vector<unsigned> tags;
  ASSERT_EQ(open_all(load, tags, 2), 2u);
  EXPECT_FALSE(jobs_.mark_late(start_ + kLate - std::chrono::nanoseconds(1)));
  EXPECT_TRUE(jobs_.mark_late(start_ + kLate));
  EXPECT_FALSE(jobs_.mark_late(start_ + 2 * kLate)) << "they are late already";
  EXPECT_EQ(jobs_.in(Step::kRead), 0u);
  EXPECT_EQ(file_system_.late(), 2u);
  EXPECT_EQ(file_system_.stuck(), 2u);
  EXPECT_EQ(load.part.open_file().stuck(), 2u);
  const Load other = this->load(other_file_system_);
  EXPECT_EQ(open_all(other, tags), kSlots) << "as many as if nothing were late";

  jobs_.close(tags[0], start_);
  EXPECT_FALSE(totals_.answers_again);
  jobs_.close(tags[1], start_);
  EXPECT_TRUE(totals_.answers_again);
  EXPECT_EQ(file_system_.late() + file_system_.stuck() + load.part.open_file().stuck(), 0u);
  close_all({tags.begin() + 2, tags.end()});
  EXPECT_TRUE(jobs_.idle());
}

TEST_F(JobsTest, AnAbandonedJobIsStuckFromTheStartAndLateOnlyWhenItIs) {
  const Load load = this->load(file_system_);
  std::vector<unsigned> tags;
  open_all(load, tags, 1);
  jobs_.enter(jobs_[tags[0]], Step::kAbandoned, start_);
  EXPECT_EQ(file_system_.stuck(), 1u);
  EXPECT_EQ(file_system_.late(), 0u);
  EXPECT_EQ(jobs_.in(Step::kRead) + jobs_.in(Step::kAbandoned), 0u);
  EXPECT_TRUE(jobs_.mark_late(start_ + kLate));
  EXPECT_EQ(file_system_.stuck(), 1u);
  EXPECT_EQ(file_system_.late(), 1u);
  jobs_.close(tags[0], start_);
  EXPECT_TRUE(jobs_.idle());
}

TEST_F(JobsTest, AStepThatTheKernelCannotKeepIsNeverLate) {
  const Load load = this->load(file_system_);
  std::vector<unsigned> tags;
  open_all(load, tags, 1);
  jobs_.enter(jobs_[tags[0]], Step::kWait, start_);
  EXPECT_FALSE(jobs_.mark_late(start_ + 10 * kLate));
  jobs_.close(tags[0], start_);
}

TEST_F(JobsTest, AJobThatIsReroutedWithoutASlotFreesItThoughItWasStuck) {
  const Load load = this->load(file_system_);
  std::vector<unsigned> tags;
  open_all(load, tags, 1);
  Job& job = jobs_[tags[0]];
  ASSERT_TRUE(jobs_.mark_late(start_ + kLate));
  job.next = 2;
  jobs_.reroute(job, way_of(load.part, *job.chunk, ChunkTraits::Route::kRefused));
  EXPECT_EQ(job.slot, -1);
  EXPECT_EQ(job.next, 0u);
  EXPECT_EQ(file_system_.stuck(), 0u);
  EXPECT_TRUE(job.view.bytes.empty());
  EXPECT_EQ(open_all(load, tags), kSlots) << "its slot is free";
  close_all(tags);
  EXPECT_TRUE(jobs_.idle());
}

// Reads of one file, one round after the other, each of which gets stuck.
TEST_F(JobsTest, AFileAndAFileSystemThatDoNotAnswerLeaveSlotsToOthers) {
  std::vector<unsigned> tags;
  Jobs::Time now = start_;
  const auto take_all = [&](const Load& load) {
    std::size_t taken = 0;
    while (const std::size_t count = open_all(load, tags)) {
      taken += count;
      jobs_.mark_late(now += 2 * kLate);
    }
    return taken;
  };
  const Load first = load(file_system_);
  const std::size_t of_file = take_all(first);
  EXPECT_GE(of_file, kDepth);
  const Load second = load(file_system_);
  const std::size_t of_second = take_all(second);
  EXPECT_GT(of_second, 0u);
  EXPECT_LT(of_file + of_second, kSlots + kSpare);
  EXPECT_FALSE(open(load(file_system_))) << "a third file gets none";
  const Load elsewhere = load(other_file_system_);
  EXPECT_GT(open_all(elsewhere, tags), 0u);
  close_all(tags);
  EXPECT_TRUE(jobs_.idle());
}

TEST_F(JobsTest, CopiesThatAreLateCountAgainstTheirTransferAndNotAgainstTheFileSystemOfItsFile) {
  std::vector<unsigned> tags;
  const Load first = load(file_system_);
  EXPECT_EQ(open_all(first, tags, 1000, Step::kScatter), kSlots);
  EXPECT_EQ(file_system_.slots(), 0u);
  jobs_.mark_late(start_ + 2 * kLate);
  EXPECT_EQ(jobs_.in(Step::kScatter), 0u);
  EXPECT_EQ(open_all(first, tags, 1000, Step::kScatter), 0u) << "spare slots are for others, too";
  EXPECT_EQ(file_system_.stuck() + first.part.open_file().stuck(), 0u);
  const Load second = load(file_system_);
  EXPECT_EQ(open_all(second, tags), kSlots);
  close_all(tags);
  EXPECT_TRUE(jobs_.idle());
  EXPECT_EQ(first.transfer->driver.stuck_copies, 0u);
}

// In place, so that only jobs run out.
TEST_F(JobsTest, AFileGetsHalfOfTheStuckJobsAndAFileSystemThreeQuarters) {
  std::vector<unsigned> tags;
  const auto take = [&](const Load& load) {
    std::size_t count = 0;
    for (; jobs_.may_have_more(load.part); ++count) {
      const std::optional<unsigned> tag = open(load, ChunkTraits::Route::kBuffered);
      if (!tag) break;
      jobs_.enter(jobs_[*tag], Step::kAbandoned, start_);
      tags.push_back(*tag);
    }
    return count;
  };
  const Load first = load(file_system_);
  EXPECT_EQ(take(first), Jobs::kStuckLimit / 2 + 1);
  std::vector<Load> more;
  do {
    more.push_back(load(file_system_));
  } while (take(more.back()) == kDepth);
  EXPECT_EQ(tags.size(), Jobs::kStuckLimit * 3 / 4 + 1);
  EXPECT_EQ(take(load(file_system_)), 0u);
  const Load other = load(other_file_system_);
  EXPECT_EQ(take(other), kDepth) << "as many as a healthy file has under way";
  close_all(tags);
  EXPECT_TRUE(jobs_.idle());
}

TEST_F(DeviceJobsTest, FileSystemsThatDoNotAnswerLeaveSlotsToOthersWhereNoneAreSpare) {
  FileSystem third_file_system{totals_};
  const Load first = load(file_system_);
  const Load more = load(file_system_);
  const Load second = load(other_file_system_);
  const Load third = load(third_file_system);
  std::vector<unsigned> tags;
  EXPECT_EQ(open_all(first, tags), 10u) << "of 14";
  jobs_.mark_late(start_ + std::chrono::seconds(1));
  EXPECT_EQ(open_all(more, tags), 0u);
  EXPECT_EQ(open_all(second, tags), 3u);
  jobs_.mark_late(start_ + std::chrono::seconds(1));
  EXPECT_EQ(open_all(third, tags), 1u);
  close_all(tags);
  tags.clear();
  EXPECT_EQ(open_all(third, tags), 10u);
  close_all(tags);
}

struct SmallPages final : PagePolicy {
  void was_touched(std::span<const std::byte>, std::chrono::nanoseconds) noexcept override {}
  bool has_small_pages(const std::byte* address) noexcept override { return address == memory; }
  const std::byte* memory = nullptr;
};

TEST_F(JobsTest, ALargeLoadPastTheCacheToSmallPagesGoesThroughSlotsWhetherTheyAreThereOrNot) {
  constexpr std::size_t kBytes = 1 << 20;
  const HostRegion memory(kBytes, "a test");
  SmallPages policy;
  const auto has_slot = [&](ChunkTraits::Route route, std::uint64_t total_bytes = std::uint64_t{1} << 30) {
    const Load large = load(file_system_, AfterLoad::kKeep, total_bytes, &policy);
    large.part.planned->plan =
        Plan::of_load({{.offset_bytes = 0, .size_bytes = kBytes, .memory = memory.data()}}, kBytes, 4096);
    return internal::has_slot(way_of(large.part, large.part.plan().chunks.front(), route).view);
  };
  policy.memory = memory.data();
  EXPECT_TRUE(has_slot(ChunkTraits::Route::kDirect)) << "fresh pages";
  std::ranges::fill(memory.bytes(), std::byte{1});
  EXPECT_TRUE(has_slot(ChunkTraits::Route::kDirect));
  EXPECT_TRUE(has_slot(ChunkTraits::Route::kDirect, 32 * kBytes));
  EXPECT_FALSE(has_slot(ChunkTraits::Route::kDirect, 32 * kBytes - 1)) << "slots take memory";
  EXPECT_FALSE(has_slot(ChunkTraits::Route::kSeemsCached));
  policy.memory = nullptr;
  EXPECT_FALSE(has_slot(ChunkTraits::Route::kDirect)) << "huge pages";
}

class TracedJobsTest : public JobsTest {
 protected:
  Jobs::Time after(int milliseconds) const { return start_ + std::chrono::milliseconds(milliseconds); }
  unsigned open_traced(const Load& load, ChunkTraits::Route route = ChunkTraits::Route::kDirect) {
    const Chunk& chunk = load.part.plan().chunks.front();
    return jobs_.open(load.part, chunk, way_of(load.part, chunk, route)).value();
  }

  testing::TraceRecorder recorder_;
  Jobs jobs_{{.tags = 4, .queue_depth = kDepth, .slots = 2},
             {std::span(slots_).first(kSlotBytes), std::span(slots_).subspan(kSlotBytes, kSlotBytes)},
             {.sink = &recorder_, .engine = 7}};
};

TEST_F(TracedJobsTest, AStepIsToldWhenItEndsWithItsTimesAndBytes) {
  const Load load = this->load(file_system_);
  load.transfer->driver.number = 3;
  const unsigned tag = open_traced(load);
  jobs_.enter(jobs_[tag], Step::kRead, after(1));
  EXPECT_TRUE(recorder_.events().empty());
  jobs_[tag].done_bytes = 4096;
  jobs_.enter(jobs_[tag], Step::kScatter, after(2));
  jobs_.enter(jobs_[tag], Step::kDeliver, after(4));
  jobs_.close(tag, after(4));
  const auto events = recorder_.events();
  ASSERT_EQ(events.size(), 2u);
  const TraceEvent& read = events[0];
  EXPECT_EQ(read.stage, TraceStage::kRead);
  EXPECT_EQ(read.engine, 7u);
  EXPECT_EQ(read.transfer, 3u);
  EXPECT_EQ(read.lane, tag);
  EXPECT_EQ(read.offset_bytes, 4096u) << "whole blocks";
  EXPECT_EQ(read.size_bytes, 4096u);
  EXPECT_EQ(read.begin, after(1));
  EXPECT_EQ(read.end, after(2));
  EXPECT_EQ(read.depth, 1u);
  EXPECT_EQ(events[1].stage, TraceStage::kCopy);
  EXPECT_EQ(events[1].offset_bytes, 5000u);
  EXPECT_EQ(events[1].size_bytes, 100u);
  EXPECT_EQ(events[1].end, after(4));
}

TEST_F(TracedJobsTest, AReadThatGoesOnIsToldInPieces) {
  const Load load = this->load(file_system_);
  const unsigned tag = open_traced(load);
  jobs_.enter(jobs_[tag], Step::kRead, after(1));
  jobs_[tag].done_bytes = 512;
  jobs_.enter(jobs_[tag], Step::kRead, after(2));
  jobs_[tag].done_bytes = 4096;
  jobs_.enter(jobs_[tag], Step::kScatter, after(3));
  const auto events = recorder_.events();
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].size_bytes, 512u);
  EXPECT_EQ(events[1].offset_bytes, 4096u + 512);
  EXPECT_EQ(events[1].size_bytes, 4096u - 512);
  jobs_.close(tag, after(3));
}

TEST_F(TracedJobsTest, AStepThatFailsIsGivenBackOrAbandonedIsToldWithoutBytes) {
  const Load load = this->load(file_system_);
  for (const Step next : {Step::kFree, Step::kAbandoned}) {
    const unsigned read = open_traced(load);
    jobs_.enter(jobs_[read], Step::kRead, after(1));
    const unsigned cached = open_traced(load, ChunkTraits::Route::kSeemsCached);
    jobs_.enter(jobs_[cached], Step::kReadIfCached, after(1));
    for (const unsigned tag : {read, cached}) {
      if (next == Step::kAbandoned) jobs_.enter(jobs_[tag], next, after(2));
      jobs_.close(tag, after(2));
    }
  }
  const auto events = recorder_.events();
  ASSERT_EQ(events.size(), 4u);
  for (const TraceEvent& event : events) {
    EXPECT_EQ(event.size_bytes, 0u);
    EXPECT_EQ(event.end, after(2));
  }
}

TEST_F(TracedJobsTest, StepsOfOneStageAreUnderWayTogetherWhateverTheyAre) {
  const Load load = this->load(file_system_);
  for (const auto& [first, second] :
       {std::pair{Step::kReadIfCached, Step::kReadCached}, {Step::kScatter, Step::kGather}}) {
    const unsigned one = open_traced(load);
    const unsigned other = open_traced(load);
    jobs_.enter(jobs_[one], first, after(1));
    jobs_.enter(jobs_[other], second, after(1));
    jobs_.close(one, after(2));
    jobs_.close(other, after(3));
  }
  const auto events = recorder_.events();
  ASSERT_EQ(events.size(), 4u);
  for (const std::size_t pair : {0u, 2u}) {
    EXPECT_EQ(events[pair].stage, events[pair + 1].stage);
    EXPECT_EQ(events[pair].depth, 2u);
    EXPECT_EQ(events[pair + 1].depth, 1u);
  }
}

TEST_F(TracedJobsTest, AWaitThatNobodyHadToWaitForIsNotTold) {
  const Load load = this->load(file_system_);
  const unsigned tag = open_traced(load);
  jobs_.enter(jobs_[tag], Step::kWait, after(1));
  jobs_.enter(jobs_[tag], Step::kWait, after(1));
  EXPECT_TRUE(recorder_.events().empty());
  jobs_.enter(jobs_[tag], Step::kScatter, after(2));
  ASSERT_EQ(recorder_.events().size(), 1u);
  EXPECT_EQ(recorder_.events().front().stage, TraceStage::kWait);
  jobs_.close(tag, after(3));
}

}  // namespace
}  // namespace flashpack::internal
