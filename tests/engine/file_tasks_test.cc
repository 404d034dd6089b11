#include "engine/file_tasks.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "engine/transfer_state.h"
#include "engine/workers.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

class FileTasksTest : public ::testing::Test {
 protected:
  FileTasksTest() { flashpack::testing::write_file(dir_ / "file", bytes_); }

  Part& add_part() {
    Part& part = transfer_->driver.parts.emplace_back(
        PartRequest{.path = dir_ / "file", .extents = {{0, bytes_.size(), read_.data()}}});
    part.transfer = transfer_.get();
    return part;
  }

  void open(Part& part) {
    part.place.state = Part::State::kOpening;
    tasks_.open(part);
  }
  void close(Part& part) {
    part.place.state = Part::State::kClosing;
    tasks_.close(part);
  }

  // Waits for one answer, as the driver does.
  Inbox::Answer answer() {
    Inbox::Messages messages;
    while (messages.answers.empty()) {
      static_cast<void>(disk_.wait(std::nullopt));
      tasks_.inbox().take(messages);
    }
    EXPECT_EQ(messages.answers.size(), 1u);
    return std::move(messages.answers.front());
  }

  flashpack::testing::TempDir dir_;
  const std::vector<std::byte> bytes_ = flashpack::testing::random_bytes(5000);
  std::vector<std::byte> read_ = std::vector<std::byte>(5000);
  const std::shared_ptr<TransferState> transfer_ = std::make_shared<TransferState>();
  std::optional<Pool> pool_{2};
  DiskThreads disk_{*pool_, 4, nullptr};
  FileTasks tasks_{*pool_, disk_, {.chunk_bytes = 1u << 20}};
};

TEST_F(FileTasksTest, AFileIsOpenedAndClosedAndTheDriverIsToldOfBoth) {
  Part& part = add_part();
  open(part);
  Inbox::Answer opened = answer();
  EXPECT_EQ(opened.transfer, transfer_);
  EXPECT_EQ(opened.part, &part);
  EXPECT_FALSE(opened.opened.failure);
  ASSERT_TRUE(opened.opened.planned);
  DiskThreads stand_in(*pool_, 1, nullptr);
  EXPECT_EQ(&opened.opened.planned->open->serving_queue(stand_in), &disk_);
  EXPECT_EQ(opened.opened.planned->plan.total_bytes, bytes_.size());
  EXPECT_FALSE(part.handover.result());

  part.planned = std::move(opened.opened.planned);
  close(part);
  EXPECT_FALSE(part.planned) << "the thread has it";
  EXPECT_EQ(answer().part, &part);
  ASSERT_TRUE(part.handover.result());
  EXPECT_FALSE(part.handover.result()->failure);
}

TEST_F(FileTasksTest, AFileThatHasChangedMeanwhileIsReportedUnlessThePartHasFailedAnyway) {
  for (const bool failed : {false, true}) {
    flashpack::testing::write_file(dir_ / "file", bytes_);
    Part& part = add_part();
    open(part);
    part.planned = std::move(answer().opened.planned);
    flashpack::testing::write_file(dir_ / "file", std::span(bytes_).first(4000));
    if (failed) part.failure = Failure(Error(Errc::kCancelled, "read"));
    close(part);
    answer();
    ASSERT_TRUE(part.handover.result());
    EXPECT_EQ(part.handover.result()->failure.has_value(), !failed);
  }
}

TEST_F(FileTasksTest, AThreadThatComesBackAfterTheDriverHasEndedClosesItsFile) {
  Inbox::Messages messages;
  tasks_.inbox().close();
  tasks_.inbox().take(messages);
  ASSERT_TRUE(tasks_.inbox().end());
  Part& part = add_part();
  const auto descriptors = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator());
  };
  const auto before = descriptors();
  part.given.reset(::open((dir_ / "file").c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_EQ(descriptors(), before + 1);
  open(part);
  pool_.reset();  // The thread has ended.
  EXPECT_EQ(descriptors(), before);
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
