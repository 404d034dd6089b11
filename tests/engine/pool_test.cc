#include "engine/pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <future>
#include <list>
#include <memory>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "tests/support/hang.h"
#include "tests/support/sandbox.h"

namespace flashpack::internal {
namespace {

using flashpack::testing::kHang;

class PoolTest : public ::testing::Test {
 protected:
  struct Work final : Pool::Task {
    void run() noexcept override { work(); }
    std::function<void()> work;
  };

  PoolTest() { pool_.emplace(2u); }
  ~PoolTest() override {
    release();
    pool_.reset();
  }

  Work& post(std::function<void()> body, Pool::Subject subject = 0) {
    Work& work = work_.emplace_back();
    work.work = std::move(body);
    work.subject = subject;
    pool_->post(work);
    return work;
  }

  // Begun, and not over before release().
  void post_stuck(Pool::Subject subject) {
    std::promise<void> begun;
    auto begins = begun.get_future();
    post(
        [begun = std::make_shared<std::promise<void>>(std::move(begun)), until = released_] {
          begun->set_value();
          until.wait();
        },
        subject);
    ASSERT_EQ(begins.wait_for(kHang), std::future_status::ready);
  }

  void release() {
    if (!std::exchange(is_released_, true)) release_.set_value();
  }

  // Whether it happens while somebody looks after the pool, as the driver does.
  bool happens(std::future<void> event) {
    const auto end = std::chrono::steady_clock::now() + kHang;
    while (event.wait_for(std::chrono::milliseconds(1)) != std::future_status::ready) {
      if (std::chrono::steady_clock::now() > end) return false;
      pool_->replace_late_threads();
    }
    return true;
  }

  std::list<Work> work_;
  std::promise<void> release_;
  std::shared_future<void> released_ = release_.get_future().share();
  bool is_released_ = false;
  std::optional<Pool> pool_;
};

TEST_F(PoolTest, ThreadsThatAreStuckAreReplaced) {
  post_stuck(1);
  post_stuck(2);
  std::promise<void> done;
  post([&] { done.set_value(); });
  EXPECT_TRUE(happens(done.get_future()));
}

TEST_F(PoolTest, TasksOfASubjectWaitWhileOneOfThemIsLateUnlessTheyAreSetFree) {
  post_stuck(1);
  post_stuck(1);
  std::promise<void> other;
  post([&] { other.set_value(); }, 2);
  ASSERT_TRUE(happens(other.get_future())) << "by now both are late";
  std::promise<void> follower;
  auto followed = follower.get_future();
  std::atomic<bool> released = false;
  post(
      [&] {
        EXPECT_TRUE(released);
        follower.set_value();
      },
      1);
  std::promise<void> free;
  pool_->set_free(post([&] { free.set_value(); }, 1));
  EXPECT_TRUE(happens(free.get_future())) << "it was posted later";
  std::promise<void> last;
  post([&] { last.set_value(); });
  EXPECT_TRUE(happens(last.get_future())) << "it was posted when the end of the queue had been taken out";
  EXPECT_NE(followed.wait_for(std::chrono::seconds(0)), std::future_status::ready);
  released = true;
  release();
  EXPECT_TRUE(happens(std::move(followed)));
}

TEST_F(PoolTest, WhatWasPostedIsRunBeforeThePoolIsGone) {
  std::atomic<int> ran = 0;
  for (int i = 0; i < 100; ++i) post([&] { ++ran; });
  pool_.reset();
  EXPECT_EQ(ran, 100);
}

// Makes a pool where the system has no thread after `allowed` ones. Returns 0 if the constructor says so.
int make_pool_where_threads_run_out(int allowed) {
  const auto answer = [left = allowed](const seccomp_data&) mutable { return left-- > 0 ? 0 : EAGAIN; };
  if (!flashpack::testing::intercept_syscalls({SYS_clone3}, answer)) return flashpack::testing::kSkip;
  try {
    const Pool pool(4);
    return 1;
  } catch (const std::system_error& error) {
    return error.code() == std::errc::resource_unavailable_try_again ? 0 : 2;
  }
}

TEST(PoolWithoutThreads, TheConstructorEndsTheThreadsThatItHasAndThrows) {
  for (const int allowed : {0, 2}) {
    const int status = flashpack::testing::run_in_child([allowed] { return make_pool_where_threads_run_out(allowed); });
    if (status == flashpack::testing::kSkip) GTEST_SKIP() << "system calls cannot be intercepted here";
    EXPECT_EQ(status, 0) << allowed;
  }
}

TEST_F(PoolTest, ATaskThatThePoolOwnsIsDeletedByTheThreadThatHasRunItAndABorrowedOneMayBePostedAgain) {
  struct Owned final : Pool::Task {
    explicit Owned(std::promise<bool> end) : over(std::move(end)) {}
    ~Owned() override { over.set_value(ran_by == std::this_thread::get_id()); }
    void run() noexcept override { ran_by = std::this_thread::get_id(); }
    std::thread::id ran_by;
    std::promise<bool> over;
  };
  std::promise<bool> over;
  auto ended = over.get_future();
  Work again;
  std::atomic<int> runs = 0;
  std::promise<void> last;
  again.work = [&] { ++runs < 3 ? pool_->post(again) : last.set_value(); };
  pool_->post(again);
  pool_->post(std::make_unique<Owned>(std::move(over)));
  ASSERT_EQ(ended.wait_for(kHang), std::future_status::ready);
  EXPECT_TRUE(ended.get());
  EXPECT_TRUE(happens(last.get_future()));
  pool_.reset();  // Before what its task borrows.
  EXPECT_EQ(runs, 3);
}

TEST_F(PoolTest, AThreadWhoseOwnTaskIsLateIsLeftBehindAndDeletesTheTask) {
  struct Owner final : Pool::Task {
    Owner(std::shared_future<void> release, std::promise<void> end) : until(std::move(release)), over(std::move(end)) {}
    ~Owner() override { over.set_value(); }
    void run() noexcept override { until.wait(); }
    std::shared_future<void> until;
    std::promise<void> over;
  };
  std::promise<void> over;
  auto ended = over.get_future();
  pool_->post(std::make_unique<Owner>(released_, std::move(over)));
  pool_.reset();
  EXPECT_NE(ended.wait_for(std::chrono::seconds(0)), std::future_status::ready);
  release();
  EXPECT_EQ(ended.wait_for(kHang), std::future_status::ready);
}

}  // namespace
}  // namespace flashpack::internal
