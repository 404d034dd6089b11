#include "flashpack/coroutine.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <fstream>
#include <future>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang.h"
#include "tests/support/plug.h"
#include "tests/support/small_loads.h"
#include "tests/support/spin.h"
#include "tests/support/temp_dir.h"
#include "tests/support/wait_until.h"

namespace flashpack {
namespace {

using testing::GuardedMemory;
using testing::kHang;
using testing::Plug;

// A coroutine that runs by itself from the call to its end.
struct Detached {
  struct promise_type {
    Detached get_return_object() noexcept { return {}; }
    std::suspend_never initial_suspend() noexcept { return {}; }
    std::suspend_never final_suspend() noexcept { return {}; }
    void return_void() noexcept {}
    void unhandled_exception() noexcept { std::terminate(); }
  };
};

// A coroutine that runs from the call on and belongs to its handle.
struct Owned {
  struct promise_type {
    Owned get_return_object() noexcept { return {std::coroutine_handle<promise_type>::from_promise(*this)}; }
    std::suspend_never initial_suspend() noexcept { return {}; }
    std::suspend_always final_suspend() noexcept { return {}; }
    void return_void() noexcept {}
    void unhandled_exception() noexcept { std::terminate(); }
  };
  std::coroutine_handle<promise_type> handle;
};

void wait_until_asleep(pid_t thread) {
  for (std::string state; state != "S";) {
    std::ifstream stat("/proc/self/task/" + std::to_string(thread) + "/stat");
    stat.ignore(std::numeric_limits<std::streamsize>::max(), ')') >> state;  // The number and the name come first.
  }
}

/// Resumes coroutines on the thread that calls run_one().
class Loop {
 public:
  AwaitOptions options(std::stop_token stop = {}) {
    return AwaitOptions([this](std::coroutine_handle<> waiting) { post(waiting); }, std::move(stop));
  }
  void run_one() {
    std::unique_lock lock(mutex_);
    if (!posted_.wait_for(lock, kHang, [this] { return !waiting_.empty(); })) throw std::runtime_error("none comes");
    const std::coroutine_handle<> next = waiting_.front();
    waiting_.pop_front();
    lock.unlock();
    next.resume();
  }
  bool empty() {
    const std::lock_guard lock(mutex_);
    return waiting_.empty();
  }

 private:
  void post(std::coroutine_handle<> waiting) {
    const std::lock_guard lock(mutex_);
    waiting_.push_back(waiting);
    posted_.notify_one();
  }

  std::mutex mutex_;  // Protects the rest.
  std::condition_variable posted_;
  std::deque<std::coroutine_handle<>> waiting_;
};

struct CoroutineTest : ::testing::Test {
  CoroutineTest() { testing::write_file(path_, bytes_); }

  LoadRequest whole() { return testing::request(path_, memory_, CachePolicy::kDirect); }
  LoadRequest missing() { return {.files = {{.path = dir_ / "none"}}}; }
  LoadRequest wrong() { return {.files = {{.path = path_, .extents = {{0, 5, nullptr}}}}}; }
  bool right() const { return testing::right(memory_, bytes_); }

  // Awaits the load and tells its error, which is empty after success.
  Detached load(LoadRequest request, AwaitOptions options, std::promise<std::error_code>& end) {
    std::error_code error;
    try {
      const TransferStats stats = co_await co_load(engine_, request, options);
      EXPECT_EQ(stats.requested_bytes, bytes_.size());
    } catch (const Error& thrown) {
      error = thrown.code();
    }
    ended_on_ = std::this_thread::get_id();
    end.set_value(error);
  }

  // Awaits a load that nobody resumes it from.
  Owned wait_in_vain(GuardedMemory& memory, AwaitOptions options) {
    const LoadRequest request = testing::request(path_, memory, CachePolicy::kDirect);
    co_await co_load(engine_, request, std::move(options));
    ADD_FAILURE() << "it goes on";
  }

  // Awaits the load on the loop, which this thread runs.
  std::error_code load_on_loop(LoadRequest request, std::stop_token stop = {}) {
    std::promise<std::error_code> end;
    load(std::move(request), loop_.options(std::move(stop)), end);
    loop_.run_one();
    EXPECT_EQ(ended_on_, std::this_thread::get_id());
    return end.get_future().get();
  }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "file";
  std::vector<std::byte> bytes_ = testing::random_bytes(3 << 20);
  GuardedMemory memory_{bytes_.size()};
  std::thread::id ended_on_;
  Loop loop_;
  Engine engine_{testing::small_engine()};
};

TEST_F(CoroutineTest, AWriteAndALoadAreAwaitedOneAfterTheOther) {
  std::promise<void> end;
  [](CoroutineTest& test, std::promise<void>& ended) -> Detached {
    FileWriter writer = test.engine_.create(test.dir_ / "copy");
    WriteRequest request;
    request.extents = {{.size_bytes = test.bytes_.size(), .source = test.bytes_.data()}};
    const TransferStats written = co_await co_write(writer, request, test.loop_.options());
    EXPECT_EQ(written.requested_bytes, test.bytes_.size());
    writer.commit();
    LoadRequest whole = test.whole();
    whole.files[0].path = test.dir_ / "copy";
    co_await co_load(test.engine_, whole);
    ended.set_value();
  }(*this, end);
  loop_.run_one();
  ASSERT_EQ(end.get_future().wait_for(kHang), std::future_status::ready);
  EXPECT_TRUE(right());
}

TEST_F(CoroutineTest, WithoutAPlaceToGoOnItIsTheDriverThread) {
  Plug plug(engine_);
  std::promise<std::error_code> end;
  load(whole(), AwaitOptions(), end);
  plug.pull();
  EXPECT_EQ(end.get_future().get(), std::error_code());
  EXPECT_NE(ended_on_, std::this_thread::get_id());
  EXPECT_TRUE(right());
}

TEST_F(CoroutineTest, EveryEndIsWhereTheOptionsSay) {
  EXPECT_EQ(load_on_loop(whole()), std::error_code());
  EXPECT_TRUE(right());
  EXPECT_EQ(load_on_loop(missing()), std::errc::no_such_file_or_directory);
  EXPECT_EQ(load_on_loop(wrong()), Errc::kInvalidArgument);
  std::stop_source stop;
  stop.request_stop();
  EXPECT_EQ(load_on_loop(wrong(), stop.get_token()), Errc::kCancelled) << "it should not have been started";
}

TEST_F(CoroutineTest, ARequestThatIsRefusedThrowsWhereItIsAwaited) {
  std::promise<std::error_code> end;
  load(wrong(), AwaitOptions(), end);
  EXPECT_EQ(end.get_future().get(), Errc::kInvalidArgument);
  EXPECT_EQ(ended_on_, std::this_thread::get_id());
}

TEST_F(CoroutineTest, TheErrorSaysWhichFilesHaveFailed) {
  std::promise<std::size_t> end;
  [](CoroutineTest& test, std::promise<std::size_t>& ended) -> Detached {
    LoadRequest request = test.whole();
    request.files.insert(request.files.begin(), test.missing().files.front());
    request.continue_on_error = true;
    std::size_t failed = 100;
    try {
      co_await co_load(test.engine_, request, test.loop_.options());
    } catch (const Error& error) {
      if (error.files().size() == 1) failed = error.files().front().file;
    }
    ended.set_value(failed);
  }(*this, end);
  loop_.run_one();
  EXPECT_EQ(end.get_future().get(), 0u);
  EXPECT_TRUE(right());
}

TEST_F(CoroutineTest, ALoadMayEndBeforeTheCoroutineIsSuspended) {
  const auto start = [this](Completion* completion) {
    Transfer load = engine_.start_load(whole(), completion);
    load.wait();
    return load;
  };
  for (const bool on_loop : {false, true}) {
    bool ended = false;
    [](auto started, AwaitOptions options, bool& end) -> Detached {
      detail::TransferAwaiter<decltype(started)> awaiter(std::move(started), std::move(options));
      const TransferStats stats = co_await awaiter;
      EXPECT_GT(stats.requested_bytes, 0u);
      end = true;
    }(start, on_loop ? loop_.options() : AwaitOptions(), ended);
    EXPECT_EQ(ended, !on_loop);
    if (on_loop) loop_.run_one();
    EXPECT_TRUE(ended);
  }
}

TEST_F(CoroutineTest, AStopEndsTheLoadThatIsUnderWay) {
  Plug plug(engine_);
  std::stop_source stop;
  std::promise<std::error_code> end;
  load(whole(), loop_.options(stop.get_token()), end);
  stop.request_stop();
  EXPECT_TRUE(loop_.empty()) << "the load has not ended yet";
  plug.pull();
  loop_.run_one();
  EXPECT_EQ(end.get_future().get(), Errc::kCancelled);
}

TEST_F(CoroutineTest, AStopAfterTheEndChangesNothing) {
  std::stop_source stop;
  std::promise<std::error_code> end;
  {
    Plug plug(engine_);
    load(whole(), loop_.options(stop.get_token()), end);
  }
  testing::wait_until([&] { return !loop_.empty(); });
  stop.request_stop();
  loop_.run_one();
  EXPECT_EQ(end.get_future().get(), std::error_code());
  EXPECT_TRUE(right());
}

TEST_F(CoroutineTest, AStopMayComeAtAnyMoment) {
  for (int round = 0; round < 200; ++round) {
    std::stop_source stop;
    std::jthread stopper([&stop, round] {
      testing::spin(round * std::chrono::microseconds(10));
      stop.request_stop();
    });
    const std::error_code error = load_on_loop(whole(), stop.get_token());
    ASSERT_TRUE(error ? error == Errc::kCancelled : right()) << error.message();
    ASSERT_TRUE(memory_.intact());
  }
}

TEST_F(CoroutineTest, ACoroutineThatIsDestroyedWhileItWaitsTakesItsLoadWithIt) {
  int resumed = 0;
  Plug plug(engine_);
  auto memory = std::make_unique<GuardedMemory>(bytes_.size());
  const auto waiting = wait_in_vain(*memory, AwaitOptions([&](std::coroutine_handle<>) { ++resumed; })).handle;
  std::promise<pid_t> thread;
  auto gone = std::async(std::launch::async, [&] {
    thread.set_value(::gettid());
    waiting.destroy();
    memory.reset();
  });
  wait_until_asleep(thread.get_future().get());
  plug.pull();
  ASSERT_EQ(gone.wait_for(kHang), std::future_status::ready);
  EXPECT_EQ(resumed, 0);
}

TEST_F(CoroutineTest, ACoroutineMayBeDestroyedAtAnyMomentIfNobodyResumesIt) {
  const auto witness = std::make_shared<int>();
  for (int round = 0; round < 100; ++round) {
    const auto memory = std::make_unique<GuardedMemory>(bytes_.size());
    const auto waiting = wait_in_vain(*memory, AwaitOptions([witness](std::coroutine_handle<>) {})).handle;
    testing::spin(round * std::chrono::microseconds(10));
    waiting.destroy();
    ASSERT_EQ(witness.use_count(), 1);
  }
}

TEST_F(CoroutineTest, AThousandCoroutinesWaitAtOnce) {
  constexpr std::size_t kPieceBytes = 3 << 10;
  std::atomic<std::size_t> left = 1000;
  std::promise<void> end;
  const auto load_piece = [&](std::size_t index) -> Detached {
    LoadRequest request;
    const std::size_t at = index * kPieceBytes;
    request.files = {{.path = path_, .extents = {{at, kPieceBytes, memory_.data() + at}}}};
    co_await co_load(engine_, request);
    if (--left == 0) end.set_value();
  };
  for (std::size_t index = 0; index < 1000; ++index) load_piece(index);
  ASSERT_EQ(end.get_future().wait_for(kHang), std::future_status::ready);
  EXPECT_TRUE(testing::same_bytes(memory_.data(), bytes_.data(), 1000 * kPieceBytes));
}

TEST_F(CoroutineTest, WhatTheOptionsHoldIsFreedAfterTheirCall) {
  const auto witness = std::make_shared<int>();
  std::promise<void> end;
  [](CoroutineTest& test, std::shared_ptr<int> held, std::promise<void>& ended) -> Detached {
    const AwaitOptions options([held](std::coroutine_handle<> waiting) { waiting.resume(); });
    const LoadRequest request = test.whole();
    for (int round = 0; round < 10; ++round) co_await co_load(test.engine_, request, options);
    ended.set_value();
  }(*this, witness, end);
  ASSERT_EQ(end.get_future().wait_for(kHang), std::future_status::ready);
  EXPECT_TRUE(right());
  Plug(engine_).pull();
  EXPECT_EQ(witness.use_count(), 1);
}

}  // namespace
}  // namespace flashpack
