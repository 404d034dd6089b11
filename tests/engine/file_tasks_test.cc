#include "engine/file_tasks.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "engine/transfer_state.h"
#include "engine/workers.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

class FileTasksTest : public ::testing::Test {
 protected:
  FileTasksTest() {
    flashpack::testing::write_file(dir_ / "file", bytes_);
    Part& part = this->part();
    part.path = dir_ / "file";
    part.transfer = transfer_.get();
    part.extents = {{0, bytes_.size(), read_.data()}};
  }

  Part& part() { return transfer_->parts.empty() ? transfer_->parts.emplace_back() : transfer_->parts.front(); }

  void ask(Part::State state) {
    part().state = state;
    tasks_.post(part());
  }

  // Waits for one answer, as the driver does.
  Inbox::Answer answer() {
    Inbox::Messages messages;
    while (messages.answers.empty()) {
      static_cast<void>(disk_.wait(std::nullopt));
      tasks_.inbox().take(messages);
    }
    EXPECT_EQ(messages.answers.size(), 1u);
    return messages.answers.front();
  }

  flashpack::testing::TempDir dir_;
  const std::vector<std::byte> bytes_ = flashpack::testing::random_bytes(5000);
  std::vector<std::byte> read_ = std::vector<std::byte>(5000);
  const std::shared_ptr<TransferState> transfer_ = std::make_shared<TransferState>();
  std::optional<Pool> pool_{2};
  DiskThreads disk_{*pool_, 4, nullptr};
  FileTasks tasks_{*pool_, disk_, 1u << 20, 0};
};

TEST_F(FileTasksTest, AFileIsOpenedAndClosedAndTheDriverIsToldOfBoth) {
  ask(Part::State::kOpening);
  const Inbox::Answer opened = answer();
  EXPECT_EQ(opened.transfer, transfer_);
  EXPECT_EQ(opened.part, &part());
  ASSERT_TRUE(part().open);
  EXPECT_EQ(part().open->queue, &disk_);
  EXPECT_EQ(part().plan.total_bytes, bytes_.size());
  EXPECT_FALSE(part().checked);

  ask(Part::State::kClosing);
  EXPECT_EQ(answer().part, &part());
  EXPECT_FALSE(part().open);
  EXPECT_TRUE(part().checked);
  EXPECT_FALSE(part().failure);
}

TEST_F(FileTasksTest, AFileThatHasChangedMeanwhileIsReportedUnlessTheTransferHasFailedAnyway) {
  for (const bool failed : {false, true}) {
    flashpack::testing::write_file(dir_ / "file", bytes_);
    ask(Part::State::kOpening);
    answer();
    flashpack::testing::write_file(dir_ / "file", std::span(bytes_).first(4000));
    if (failed) transfer_->failure = Failure(Error(Errc::kCancelled, "read"));
    ask(Part::State::kClosing);
    answer();
    EXPECT_EQ(part().failure.has_value(), !failed);
    part().failure.reset();
    part().plan = {};
    part().checked = false;
    part().extents = {{0, bytes_.size(), read_.data()}};
  }
}

TEST_F(FileTasksTest, AThreadThatComesBackAfterTheDriverHasEndedClosesItsFile) {
  Inbox::Messages messages;
  tasks_.inbox().close();
  tasks_.inbox().take(messages);
  ASSERT_TRUE(tasks_.inbox().end());
  ask(Part::State::kOpening);
  pool_.reset();  // The thread has ended.
  EXPECT_FALSE(part().open);
  EXPECT_EQ(part().plan.total_bytes, bytes_.size()) << "it was open";
  tasks_.inbox().take(messages);
  EXPECT_TRUE(messages.answers.empty());
}

TEST_F(FileTasksTest, ADescriptorThatWasNotUsedIsClosed) {
  std::array<int, 2> ends{};
  ASSERT_EQ(::pipe(ends.data()), 0);
  const UniqueFd reader(ends[0]);
  tasks_.close(UniqueFd(ends[1]));
  std::byte byte{};
  EXPECT_EQ(::read(reader.get(), &byte, 1), 0) << "a pipe ends when its other end has been closed";
}

}  // namespace
}  // namespace flashpack::internal
