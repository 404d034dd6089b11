#include "engine/inbox.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <memory>
#include <thread>
#include <vector>

#include "engine/ring.h"
#include "engine/transfer_state.h"
#include "engine/workers.h"
#include "tests/support/hang.h"

namespace flashpack::internal {
namespace {

// Counts how often it is woken.
class Sleeper final : public Queue {
 public:
  void cancel(unsigned) override {}
  std::span<const IoCompletion> wait(std::optional<std::chrono::nanoseconds>) override { return {}; }
  void wake() noexcept override { ++wakes; }

  int wakes = 0;
};

std::shared_ptr<TransferState> transfer() { return std::make_shared<TransferState>(); }

TEST(InboxTest, TheDriverIsWokenForEachMessageAndTakesItOnce) {
  Sleeper sleeper;
  Inbox inbox(sleeper);
  const auto first = transfer();
  const auto second = transfer();
  Part part;
  inbox.start(first);
  inbox.start(second);
  inbox.cancel(first);
  inbox.answer({second, &part});
  EXPECT_EQ(sleeper.wakes, 4);
  Inbox* borrowed = nullptr;
  first->with_inbox([&](Inbox& started_by) { borrowed = &started_by; });
  EXPECT_EQ(borrowed, &inbox);

  Inbox::Messages messages;
  inbox.take(messages);
  EXPECT_EQ(messages.started, (std::vector{first, second}));
  EXPECT_EQ(messages.cancelled, first);
  ASSERT_EQ(messages.answers.size(), 1u);
  EXPECT_EQ(messages.answers.front().transfer, second);
  EXPECT_EQ(messages.answers.front().part, &part);

  messages = {};
  inbox.take(messages);
  EXPECT_TRUE(messages.started.empty() && messages.answers.empty() && !messages.cancelled);
}

TEST(InboxTest, AllTransfersThatAreCancelledAreInOneList) {
  Sleeper sleeper;
  Inbox inbox(sleeper);
  const std::vector transfers{transfer(), transfer(), transfer()};
  for (const auto& each : transfers) inbox.cancel(each);
  Inbox::Messages messages;
  inbox.take(messages);
  std::vector<std::shared_ptr<TransferState>> cancelled;
  for (auto at = messages.cancelled; at; at = at->next_cancelled) cancelled.push_back(at);
  EXPECT_EQ(cancelled, (std::vector{transfers[2], transfers[1], transfers[0]}));
}

TEST(InboxTest, TheDriverMayEndWhenTheInboxIsClosedAndNothingIsLeftInIt) {
  Sleeper sleeper;
  Inbox inbox(sleeper);
  Inbox::Messages messages;
  EXPECT_FALSE(inbox.end());
  inbox.start(transfer());
  inbox.close();
  EXPECT_EQ(sleeper.wakes, 2);
  EXPECT_FALSE(inbox.end());
  inbox.take(messages);
  EXPECT_TRUE(inbox.end());
}

TEST(InboxTest, AfterTheEndTheFileOfAnAnswerIsClosedAndNobodyIsWoken) {
  Sleeper sleeper;
  Inbox inbox(sleeper);
  Inbox::Messages messages;
  inbox.close();
  inbox.take(messages);
  ASSERT_TRUE(inbox.end());
  const auto owner = transfer();
  auto planned = std::make_unique<PlannedFile>();
  planned->open = FileUse(File::open("/proc/self/exe", std::nullopt, false), nullptr);
  const int fd = planned->open->file.buffered_fd();
  Part part;
  inbox.answer({owner, &part, {.planned = std::move(planned)}});
  EXPECT_LT(::fcntl(fd, F_GETFD), 0);
  EXPECT_EQ(owner.use_count(), 1);
  inbox.close();
  EXPECT_EQ(sleeper.wakes, 1);
}

// Has three threads start transfers while the driver sleeps in `queue`, and looks at its inbox only when it is woken.
void expect_that_no_message_is_missed(Queue& queue) {
  constexpr std::size_t kEach = 2000;
  Inbox inbox(queue);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      for (std::size_t n = 0; n < kEach; ++n) inbox.start(transfer());
    });
  }
  std::size_t taken = 0;
  const auto give_up = std::chrono::steady_clock::now() + flashpack::testing::kHang;
  while (taken < threads.size() * kEach && std::chrono::steady_clock::now() < give_up) {
    Inbox::Messages messages;
    inbox.take(messages);
    taken += messages.started.size();
    if (messages.started.empty()) static_cast<void>(queue.wait(flashpack::testing::kHang));
  }
  EXPECT_EQ(taken, threads.size() * kEach);
  for (std::thread& thread : threads) thread.join();
}

TEST(InboxTest, ADriverThatSleepsInARingMissesNoMessage) {
  std::unique_ptr<Ring> ring;
  try {
    ring = std::make_unique<Ring>(4, std::vector<std::span<std::byte>>{});
  } catch (const std::system_error& refused) {
    GTEST_SKIP() << refused.what();
  }
  expect_that_no_message_is_missed(*ring);
}

TEST(InboxTest, ADriverThatSleepsInDiskThreadsMissesNoMessage) {
  Pool pool(1);
  DiskThreads disk(pool, 4, nullptr);
  expect_that_no_message_is_missed(disk);
}

}  // namespace
}  // namespace flashpack::internal
