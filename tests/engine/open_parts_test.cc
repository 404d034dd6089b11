#include "engine/open_parts.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <ranges>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "engine/transfer_state.h"
#include "tests/support/temp_dir.h"
#include "tests/support/trace_recorder.h"

namespace flashpack::internal {
namespace {

using State = Part::State;

class OpenPartsTest : public ::testing::Test {
 protected:
  OpenPartsTest() {
    testing::write_file(dir_ / "file", {});
    file_ = FileUse(File::open(dir_ / "file", std::nullopt, false), nullptr);
  }

  // A waiting part of a load. Nothing needs to be at the path.
  Part& wait(const std::filesystem::path& path) {
    Part& part = transfer_->driver.parts.emplace_back(PartRequest{.path = path});
    part.transfer = transfer_.get();
    part.turn = turns_++;
    enter(part, State::kWaiting);
    return part;
  }
  void enter(Part& part, State state) { parts_.enter(part, state, now_); }

  // Has the file of the part opened.
  void open(Part& part) {
    ASSERT_EQ(parts_.find_next(), &part);
    enter(part, State::kOpening);
    answer(part);
  }
  void answer(Part& part) {
    enter(part, State::kAnswered);
    part.planned = planned();
    enter(part, State::kOpen);
  }
  std::unique_ptr<PlannedFile> planned() const { return std::make_unique<PlannedFile>(PlannedFile{.open = file_}); }
  void close(Part& part) {
    enter(part, State::kClosing);
    part.handover.end({});
    enter(part, State::kDone);
  }

  // The parts that are being opened when no further one may be.
  std::vector<Part*> open_as_many_as_possible() {
    std::vector<Part*> opened;
    while (Part* const part = parts_.find_next()) {
      enter(*part, State::kOpening);
      opened.push_back(part);
    }
    return opened;
  }

  // Has files opened until no further one may be, though each of them becomes late.
  std::vector<Part*> open_late_ones() {
    std::vector<Part*> opened;
    while (true) {
      const std::vector<Part*> more = open_as_many_as_possible();
      if (more.empty()) return opened;
      opened.insert(opened.end(), more.begin(), more.end());
      parts_.mark_late(now_ += 2 * kLate);
    }
  }

  void end(Part& part) {
    enter(part, State::kAnswered);
    enter(part, State::kDone);
  }

  testing::TempDir dir_;
  FileUse file_;
  std::shared_ptr<TransferState> transfer_ = std::make_shared<TransferState>();
  std::uint64_t turns_ = 0;
  OpenParts::Time now_ = std::chrono::steady_clock::now();
  OpenParts parts_{[] {
    std::istringstream lines("1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / /mounted rw - nfs server:/ rw\n");
    return Mounts(lines);
  }};
};

TEST_F(OpenPartsTest, SoManyFilesAreOpenAtATimeInTheOrderOfTheirTurns) {
  std::deque<Part*> all;
  for (std::size_t i = 0; i < OpenParts::kMaxOpen + 2; ++i) all.push_back(&wait("/a/" + std::to_string(i)));
  const std::vector<Part*> opened = open_as_many_as_possible();
  EXPECT_TRUE(std::ranges::equal(opened, all | std::views::take(OpenParts::kMaxOpen)));
  EXPECT_EQ(parts_.with_threads(), opened);
  EXPECT_TRUE(opened[0]->place.alone);
  EXPECT_FALSE(opened[1]->place.alone);
  answer(*opened[0]);
  EXPECT_EQ(parts_.find_next(), nullptr) << "it is still open";
  enter(*opened[0], State::kClosing);
  EXPECT_EQ(parts_.find_next(), nullptr) << "it is being closed";
  opened[0]->handover.end({});
  enter(*opened[0], State::kDone);
  EXPECT_EQ(parts_.find_next(), all[OpenParts::kMaxOpen]);
}

TEST_F(OpenPartsTest, AWaitingPartThatIsGivenUpIsNotOpened) {
  Part& first = wait("/a/1");
  Part& second = wait("/a/2");
  enter(first, State::kDone);
  EXPECT_EQ(parts_.find_next(), &second);
}

TEST_F(OpenPartsTest, AStoreDoesNotCountAmongTheOpenFiles) {
  const auto store = std::make_shared<TransferState>(TransferRequest{.direction = Direction::kStore});
  std::deque<Part>& parts = store->driver.parts;
  for (std::size_t i = 0; i < OpenParts::kMaxOpen; ++i) {
    Part& part = parts.emplace_back();
    part.transfer = store.get();
    part.planned = planned();
    enter(part, State::kOpen);
  }
  Part& load = wait("/a/1");
  open(load);
  EXPECT_TRUE(load.place.alone);
  EXPECT_EQ(load.place.file_system->loads(), 1u);
  for (Part& part : parts) enter(part, State::kDone);
  enter(load, State::kClosing);
  EXPECT_EQ(load.place.file_system->loads(), 0u);
}

TEST_F(OpenPartsTest, WithoutDescriptorsFewerFilesAreOpenUntilFilesHaveBeenClosed) {
  for (int i = 0; i < 10; ++i) wait("/a/" + std::to_string(i));
  std::vector<Part*> opened;
  for (int i = 0; i < 4; ++i) {
    opened.push_back(parts_.find_next());
    enter(*opened.back(), State::kOpening);
  }
  enter(*opened[3], State::kAnswered);
  enter(*opened[3], State::kWaiting);
  EXPECT_EQ(parts_.find_next(), nullptr) << "three are open, which was all that the process could have";
  answer(*opened[0]);
  close(*opened[0]);
  EXPECT_EQ(open_as_many_as_possible().size(), 2u) << "in place of the closed one, and one more as a trial";
}

TEST_F(OpenPartsTest, AFileThatCannotBeOpenedMakesRoomButNoTrialOfMore) {
  for (int i = 0; i < 10; ++i) wait("/a/" + std::to_string(i));
  Part& first = *parts_.find_next();
  enter(first, State::kOpening);
  Part& second = *parts_.find_next();
  enter(second, State::kOpening);
  enter(second, State::kAnswered);
  enter(second, State::kWaiting);
  enter(first, State::kAnswered);
  enter(first, State::kDone);
  EXPECT_EQ(open_as_many_as_possible().size(), 1u);
}

TEST_F(OpenPartsTest, PartsWhoseThreadsAreLateMakeRoomForOthers) {
  for (std::size_t i = 0; i < 2 * OpenParts::kMaxOpen; ++i) wait("/a/" + std::to_string(i));
  const std::vector<Part*> late = open_as_many_as_possible();
  EXPECT_EQ(late.size(), OpenParts::kMaxOpen);
  parts_.mark_late(now_ + kLate - std::chrono::nanoseconds(1));
  EXPECT_EQ(parts_.find_next(), nullptr);
  parts_.mark_late(now_ + kLate);
  EXPECT_TRUE(late.front()->place.late);
  Part* const next = parts_.find_next();
  ASSERT_NE(next, nullptr);
  enter(*next, State::kOpening);
  EXPECT_TRUE(next->place.alone) << "nothing that answers is open beside it";
  answer(*late.front());
  EXPECT_FALSE(late.front()->place.late);
}

TEST_F(OpenPartsTest, PartsOfAFileSystemThatDoesNotAnswerMakeRoomForOthers) {
  std::vector<Part*> parts;
  for (std::size_t i = 0; i < OpenParts::kMaxOpen; ++i) open(*parts.emplace_back(&wait("/a/" + std::to_string(i))));
  Part& other = wait("/b/1");
  EXPECT_EQ(parts_.find_next(), nullptr);
  parts[0]->place.file_system->add_late();
  EXPECT_EQ(parts_.find_next(), &other);
}

TEST(FileSystemTest, AllOfItsLoadsAreHeldUpFromTheFirstLateOperationToTheLast) {
  FileSystem::Totals totals;
  FileSystem dead(totals);
  FileSystem other(totals);
  dead.add_load();
  dead.add_load();
  other.add_load();
  EXPECT_EQ(totals.held_up_loads, 0u);
  dead.add_late();
  dead.add_late();
  EXPECT_EQ(totals.held_up_loads, 2u);
  dead.add_load();
  EXPECT_EQ(totals.held_up_loads, 3u) << "one that is opened meanwhile, too";
  dead.remove_load();
  dead.remove_late();
  EXPECT_EQ(totals.held_up_loads, 2u);
  EXPECT_FALSE(totals.answers_again) << "one operation is still late";
  dead.remove_late();
  EXPECT_EQ(totals.held_up_loads, 0u);
  EXPECT_TRUE(totals.answers_again);
}

TEST_F(OpenPartsTest, ADirectoryWhoseFilesDoNotOpenGetsAThirdAndTheRestOfItIsParked) {
  for (int round = 0; round < 2; ++round) {
    std::vector<Part*> all;
    for (std::size_t i = 0; i < OpenParts::kHeldUpLimit; ++i) all.push_back(&wait("/a/" + std::to_string(i)));
    const std::vector<Part*> late = open_late_ones();
    EXPECT_EQ(late.size(), OpenParts::kHeldUpLimit / 3 + 1) << round;
    Part& other = wait("/b/1");
    EXPECT_EQ(parts_.find_next(), &other);
    enter(other, State::kDone);
    for (Part* const part : all) part->state() == State::kOpening ? end(*part) : enter(*part, State::kDone);
    EXPECT_EQ(parts_.find_next(), nullptr) << "those that were parked are given up, too";
  }
}

TEST_F(OpenPartsTest, AMountPointGetsHalfAndTheRestOfItIsParked) {
  for (std::size_t i = 0; i < 2 * OpenParts::kHeldUpLimit; ++i) wait("/a/" + std::to_string(i) + "/file");
  EXPECT_EQ(open_late_ones().size(), OpenParts::kHeldUpLimit / 2 + 1);
  Part& same_mount = wait("/b/file");
  EXPECT_EQ(parts_.find_next(), nullptr) << "the same mount point";
  enter(same_mount, State::kDone);
  Part& other_mount = wait("/mounted/file");
  EXPECT_EQ(parts_.find_next(), &other_mount);
}

TEST_F(OpenPartsTest, ParkedPartsHaveTheirTurnWhenALateThreadComesBack) {
  for (std::size_t i = 0; i < OpenParts::kHeldUpLimit; ++i) wait("/a/" + std::to_string(i));
  const std::vector<Part*> late = open_late_ones();
  EXPECT_EQ(parts_.find_next(), nullptr);
  end(*late[0]);
  EXPECT_NE(parts_.find_next(), nullptr);
}

TEST_F(OpenPartsTest, ParkedPartsHaveTheirTurnWhenTheLastLateOperationComesBack) {
  std::vector<Part*> opened;
  for (std::size_t i = 0; i < OpenParts::kMaxOpen; ++i) open(*opened.emplace_back(&wait("/a/" + std::to_string(i))));
  FileSystem& file_system = *opened[0]->place.file_system;
  file_system.add_late();
  parts_.read_mounts();
  for (std::size_t i = 0; i < OpenParts::kHeldUpLimit; ++i) wait("/a/more" + std::to_string(i));
  while (Part* const part = parts_.find_next()) {
    enter(*part, State::kOpening);
    answer(*part);
  }
  EXPECT_LT(file_system.loads(), OpenParts::kHeldUpLimit);
  file_system.remove_late();
  for (Part& part : transfer_->driver.parts) {
    if (part.state() == State::kOpen && file_system.loads() >= OpenParts::kMaxOpen) close(part);
  }
  EXPECT_NE(parts_.find_next(), nullptr);
}

TEST_F(OpenPartsTest, PlacesWhereEveryPartIsDoneAreForgotten) {
  Part& late = wait("/late/file");
  ASSERT_EQ(parts_.find_next(), &late);
  enter(late, State::kOpening);
  parts_.mark_late(now_ += 2 * kLate);  // From here on, directories and mount points are looked up.
  EXPECT_EQ(parts_.tracked(), 2u) << "/late and /";
  for (int i = 0; i < 100; ++i) {
    Part& part = wait("/mounted/" + std::to_string(i) + "/file");
    open(part);
    ASSERT_EQ(parts_.tracked(), 5u) << "its directory, its mount point and its file system";
    close(part);
    Part& given_up = wait("/" + std::to_string(i) + "/file");
    EXPECT_EQ(parts_.find_next(), &given_up);
    enter(given_up, State::kDone);
  }
  EXPECT_EQ(parts_.tracked(), 2u);
  end(late);
  EXPECT_EQ(parts_.tracked(), 0u);
}

TEST_F(OpenPartsTest, AFileSystemWithALateOperationIsKeptForAllThatPointToIt) {
  Part& stuck = wait("/a/1");
  open(stuck);
  stuck.place.file_system->add_late();
  parts_.read_mounts();
  Part& second = wait("/a/2");
  open(second);
  Part& third = wait("/a/3");
  EXPECT_EQ(parts_.find_next(), &third);
  close(second);
  EXPECT_EQ(third.place.prefixes[0]->held_up_loads(), 1u) << "it counts what is still held up there";
  stuck.place.file_system->remove_late();
  close(stuck);
  EXPECT_EQ(third.place.prefixes[0]->held_up_loads(), 0u);
  EXPECT_EQ(third.place.prefixes[0]->file_system->loads(), 0u) << "the prefix keeps it";
  enter(third, State::kDone);
  EXPECT_EQ(parts_.tracked(), 0u);
}

TEST_F(OpenPartsTest, OpeningAndClosingAreToldWithTheirTimesAndWhatWasReadAtOnce) {
  testing::TraceRecorder recorder;
  OpenParts traced([] { return Mounts(); }, {.sink = &recorder, .engine = 2});
  Part& part = transfer_->driver.parts.emplace_back(PartRequest{.path = "/a/file", .index = 5});
  part.transfer = transfer_.get();
  const auto after = [this](int milliseconds) { return now_ + std::chrono::milliseconds(milliseconds); };
  traced.enter(part, State::kWaiting, after(0));
  traced.enter(part, State::kOpening, after(1));
  traced.enter(part, State::kAnswered, after(3));
  part.planned = planned();
  traced.enter(part, State::kOpen, after(3));
  traced.enter(part, State::kClosing, after(6));
  part.handover.end({.read_bytes = 9});
  traced.enter(part, State::kDone, after(7));
  const auto events = recorder.events();
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].stage, TraceStage::kOpen);
  EXPECT_EQ(events[0].engine, 2u);
  EXPECT_EQ(events[0].file, 5u);
  EXPECT_EQ(recorder.paths()[0], "/a/file");
  EXPECT_EQ(events[0].begin, after(1));
  EXPECT_EQ(events[0].end, after(3));
  EXPECT_EQ(events[0].depth, 1u);
  EXPECT_EQ(events[1].stage, TraceStage::kClose);
  EXPECT_EQ(events[1].begin, after(6));
  EXPECT_EQ(events[1].end, after(7));

  Part& small = transfer_->driver.parts.emplace_back(PartRequest{.path = "/a/small"});
  small.transfer = transfer_.get();
  traced.enter(small, State::kOpening, after(8));
  small.handover.end({.read_bytes = 100});
  traced.enter(small, State::kDone, after(9));
  ASSERT_EQ(recorder.events().size(), 3u);
  EXPECT_EQ(recorder.events().back().size_bytes, 100u);
}

TEST_F(OpenPartsTest, AFileThatIsOpenedIsNotCountedWithThoseThatAreClosed) {
  testing::TraceRecorder recorder;
  OpenParts traced([] { return Mounts(); }, {.sink = &recorder, .engine = 2});
  const std::array states{State::kOpening, State::kClosing, State::kClosing};
  std::vector<Part*> parts;
  for (const State state : states) {
    parts.push_back(&transfer_->driver.parts.emplace_back(PartRequest{.path = "/a/file"}));
    parts.back()->transfer = transfer_.get();
    traced.enter(*parts.back(), state, now_);
  }
  for (Part* part : parts) traced.enter(*part, State::kDone, now_);
  ASSERT_EQ(recorder.events().size(), 3u);
  for (const auto& [event, depth] : {std::pair{0u, 1u}, {1u, 2u}, {2u, 1u}})
    EXPECT_EQ(recorder.events()[event].depth, depth);
}

}  // namespace
}  // namespace flashpack::internal
