#include "flashpack/async.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <boost/asio/any_completion_handler.hpp>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/deferred.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/execution/blocking.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/use_future.hpp>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <variant>

#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/plug.h"
#include "tests/support/sandbox.h"
#include "tests/support/sanitizers.h"
#include "tests/support/spin.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

namespace asio = boost::asio;
using testing::GuardedMemory;

class AsyncTest : public ::testing::Test {
 protected:
  AsyncTest() { testing::write_file(path_, bytes_); }

  LoadRequest request() {
    return {.files = {{.path = path_, .extents = {{0, memory_.size(), memory_.data()}}}},
            .cache = CachePolicy::kDirect};
  }
  bool right() const { return memory_.intact() && testing::same_bytes(memory_.data(), bytes_.data(), bytes_.size()); }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "file";
  std::vector<std::byte> bytes_ = testing::random_bytes(3 << 20);
  GuardedMemory memory_{bytes_.size()};
  asio::io_context context_;
  Engine engine_{{.chunk_bytes = 1 << 20, .staging_bytes = 4 << 20}};
};

TEST_F(AsyncTest, CoroutinesAwaitLoadsAndWrites) {
  bool finished = false;
  asio::co_spawn(
      context_,
      [&]() -> asio::awaitable<void> {
        FileWriter writer = engine_.create(dir_ / "copy");
        WriteRequest whole;
        whole.extents = {{.size_bytes = bytes_.size(), .source = bytes_.data()}};
        co_await async_write(writer, std::move(whole), asio::use_awaitable);
        writer.commit();
        const TransferStats stats = co_await async_load(engine_, request(), asio::use_awaitable);
        EXPECT_EQ(stats.requested_bytes, bytes_.size());
        finished = true;
      },
      asio::detached);
  context_.run();
  EXPECT_TRUE(finished);
  EXPECT_TRUE(right());
  EXPECT_TRUE(testing::file_has(dir_ / "copy", bytes_));
}

TEST_F(AsyncTest, FuturesCarryTheError) {
  auto missing = async_load(engine_, {.files = {{.path = dir_ / "none"}}}, asio::use_future);
  try {
    missing.get();
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), std::errc::no_such_file_or_directory);
  }
}

TEST_F(AsyncTest, TheErrorSaysWhichFilesHaveFailed) {
  LoadRequest wanted = request();
  wanted.files.insert(wanted.files.begin(), {.path = dir_ / "none"});
  wanted.continue_on_error = true;
  auto load = async_load(engine_, wanted, asio::use_future);
  try {
    load.get();
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), std::errc::no_such_file_or_directory);
    ASSERT_EQ(error.files().size(), 1u);
    EXPECT_EQ(error.files().front().file, 0u);
  }
  EXPECT_TRUE(right());
}

TEST_F(AsyncTest, ARequestThatIsWrongInItselfIsReportedThroughTheHandlerToo) {
  bool inside = true;
  std::exception_ptr seen;
  async_load(engine_, {.files = {{.path = path_, .extents = {{0, 5, nullptr}}}}},
             asio::bind_executor(context_, [&](std::exception_ptr error, TransferStats) {
               EXPECT_FALSE(inside);
               seen = error;
             }));
  inside = false;
  context_.run();
  EXPECT_TRUE(seen);
}

TEST_F(AsyncTest, DeferredOperationsCanBeAwaited) {
  std::string error;
  asio::co_spawn(
      context_,
      [&]() -> asio::awaitable<void> {
        const TransferStats stats = co_await async_load(engine_, request(), asio::deferred);
        EXPECT_EQ(stats.requested_bytes, bytes_.size());
        LoadRequest missing = request();
        missing.files[0].path = dir_ / "none";
        try {
          co_await async_load(engine_, missing, asio::deferred);
        } catch (const Error& caught) {
          error = caught.what();
        }
      },
      asio::detached);
  context_.run();
  EXPECT_TRUE(right());
  EXPECT_NE(error.find("No such file"), std::string::npos) << error;
}

TEST_F(AsyncTest, AContextThatEndsFirstWaitsForTheLoadAndDropsTheHandler) {
  for (int round = 0; round < 50; ++round) {
    auto context = std::make_unique<asio::io_context>();
    const auto owned = std::make_shared<GuardedMemory>(bytes_.size(), round % 2 ? 64 : 0);
    LoadRequest wanted = request();
    wanted.files[0].extents[0].target = owned->data();
    async_load(engine_, wanted, asio::bind_executor(*context, [owned](std::exception_ptr, TransferStats) { FAIL(); }));
    testing::spin(round * std::chrono::microseconds(10));
    context.reset();
    ASSERT_EQ(owned.use_count(), 1) << "the handler lives on, and with it the load into its memory";
    EXPECT_TRUE(owned->intact());
  }
}

TEST_F(AsyncTest, AContextThatEndsFirstEndsTheCoroutineThatAwaits) {
  const auto witness = std::make_shared<int>();
  for (const bool with_engine_of_its_own : {false, true}) {
    auto context = std::make_unique<asio::io_context>();
    asio::co_spawn(
        *context,
        [this, with_engine_of_its_own, witness = witness]() -> asio::awaitable<void> {
          std::optional<Engine> own;
          if (with_engine_of_its_own) own.emplace(EngineOptions{.chunk_bytes = 1 << 20, .staging_bytes = 4 << 20});
          GuardedMemory memory(bytes_.size());
          LoadRequest wanted = request();
          wanted.files[0].extents[0].target = memory.data();
          while (true) co_await async_load(own ? *own : engine_, wanted, asio::use_awaitable);
        },
        asio::detached);
    context->run_one();
    context->run_one();
    context.reset();
    EXPECT_EQ(witness.use_count(), 1);
  }
}

#if !FLASHPACK_TSAN  // It allows the child of threads no threads.
TEST_F(AsyncTest, AForkedChildUsesTheContextOfItsParentWithAnEngineOfItsOwn) {
  auto context = std::make_unique<asio::io_context>();
  const auto start = [&](Engine& engine) {
    const auto owned = std::make_shared<GuardedMemory>(bytes_.size());
    LoadRequest wanted = request();
    wanted.files[0].extents[0].target = owned->data();
    async_load(engine, wanted, asio::bind_executor(*context, [owned](std::exception_ptr, TransferStats) { FAIL(); }));
    return std::weak_ptr(owned);
  };
  testing::Plug plug(engine_);
  const auto of_parent = start(engine_);
  context->notify_fork(asio::execution_context::fork_prepare);
  const int status = testing::run_in_child([&] {
    ::alarm(60);  // It ends a child that waits for the threads of its parent.
    context->notify_fork(asio::execution_context::fork_child);
    Engine own({.chunk_bytes = 1 << 20, .staging_bytes = 4 << 20});
    bool ended = false;
    async_load(own, request(), asio::bind_executor(*context, [&](std::exception_ptr, TransferStats) { ended = true; }));
    context->run();  // It returns although the parent's operation does not end here.
    const auto of_child = start(own);
    context.reset();
    return ended && of_child.expired() && !of_parent.expired() ? 0 : 1;
  });
  context->notify_fork(asio::execution_context::fork_parent);
  EXPECT_EQ(status, 0);
  plug.pull();
  context.reset();
  EXPECT_TRUE(of_parent.expired());
}
#endif

TEST_F(AsyncTest, CancellationEndsTheOperationOnce) {
  for (int round = 0; round < 50; ++round) {
    context_.restart();
    asio::cancellation_signal signal;
    int calls = 0;
    async_load(engine_, request(),
               asio::bind_cancellation_slot(
                   signal.slot(), asio::bind_executor(context_, [&](std::exception_ptr, TransferStats) { ++calls; })));
    asio::post(context_, [&] { signal.emit(asio::cancellation_type::terminal); });
    context_.run();
    EXPECT_EQ(calls, 1);
    EXPECT_TRUE(memory_.intact());
  }
}

TEST_F(AsyncTest, ATimerThatWinsCancelsTheLoad) {
  using asio::experimental::awaitable_operators::operator||;
  std::error_code ended;
  bool expired = false;
  std::size_t winner = 0;
  const auto load = [&]() -> asio::awaitable<void> {
    try {
      co_await async_load(engine_, request(), asio::use_awaitable);
    } catch (const Error& error) {
      ended = error.code();
      throw;
    }
  };
  const auto timeout = [&]() -> asio::awaitable<void> {
    asio::steady_timer timer(context_, std::chrono::steady_clock::now());
    co_await timer.async_wait(asio::use_awaitable);
    expired = true;
  };
  const auto race = [&]() -> asio::awaitable<void> {
    const std::variant<std::monostate, std::monostate> first = co_await (load() || timeout());
    winner = first.index();
    testing::fill_bytes(memory_.data(), std::byte{0x17}, memory_.size());
  };
  testing::Plug plug(engine_);
  asio::co_spawn(context_, race, asio::detached);
  while (!expired) context_.run_one();
  context_.poll();  // The end of the timer's coroutine cancels the load.
  plug.pull();
  context_.run();
  EXPECT_EQ(ended, Errc::kCancelled);
  EXPECT_EQ(winner, 1u);
  ASSERT_TRUE(memory_.intact());
  const std::vector<std::byte> own(memory_.size(), std::byte{0x17});
  EXPECT_TRUE(testing::same_bytes(memory_.data(), own.data(), own.size()));
}

TEST_F(AsyncTest, ALoadThatWinsEndsTheTimer) {
  using asio::experimental::awaitable_operators::operator||;
  std::uint64_t loaded_bytes = 0;
  const auto race = [&]() -> asio::awaitable<void> {
    asio::steady_timer timer(context_, asio::steady_timer::time_point::max());
    const std::variant<TransferStats, std::monostate> first =
        co_await (async_load(engine_, request(), asio::use_awaitable) || timer.async_wait(asio::use_awaitable));
    loaded_bytes = std::get<TransferStats>(first).requested_bytes;
  };
  asio::co_spawn(context_, race, asio::detached);
  context_.run();
  EXPECT_EQ(loaded_bytes, bytes_.size());
  EXPECT_TRUE(right());
}

TEST_F(AsyncTest, ATupleHasTheErrorInPlaceOfAThrow) {
  std::string error;
  std::uint64_t loaded_bytes = 0;
  const auto loads = [&]() -> asio::awaitable<void> {
    const auto [none, stats] = co_await async_load(engine_, request(), asio::as_tuple(asio::use_awaitable));
    EXPECT_FALSE(none);
    loaded_bytes = stats.requested_bytes;
    LoadRequest missing = request();
    missing.files[0].path = dir_ / "none";
    const auto [caught, nothing] = co_await async_load(engine_, missing, asio::as_tuple(asio::deferred));
    try {
      if (caught) std::rethrow_exception(caught);
    } catch (const Error& thrown) {
      error = thrown.what();
    }
  };
  asio::co_spawn(context_, loads, asio::detached);
  context_.run();
  EXPECT_EQ(loaded_bytes, bytes_.size());
  EXPECT_TRUE(right());
  EXPECT_NE(error.find("No such file"), std::string::npos) << error;
}

TEST_F(AsyncTest, HandlersOfAStrandRunOnItOneAtATime) {
  asio::thread_pool pool(2);
  const auto strand = asio::make_strand(pool);
  int calls = 0;  // A data race, which TSan shows, if the strand is not kept.
  for (int i = 0; i < 50; ++i) {
    async_load(engine_, {.files = {{.path = path_}}},
               asio::bind_executor(strand, [&, strand](std::exception_ptr error, TransferStats) {
                 EXPECT_FALSE(error);
                 EXPECT_TRUE(strand.running_in_this_thread());
                 ++calls;
               }));
  }
  pool.join();
  EXPECT_EQ(calls, 50);
}

// A loop that is not Asio's: its executor is of no execution context, and only keeps what it is given.
struct ForeignLoop {
  struct Executor {
    ForeignLoop* loop;

    template <class Work>
    void execute(Work given) const {
      const std::lock_guard lock(loop->mutex);
      const auto shared = std::make_shared<Work>(std::move(given));
      loop->work.emplace_back([shared] { (*shared)(); });
      loop->came.notify_one();
    }
    static constexpr auto query(asio::execution::blocking_t) noexcept { return asio::execution::blocking.never; }
    bool operator==(const Executor&) const noexcept = default;
  };

  void run_one() {
    std::unique_lock lock(mutex);
    came.wait(lock, [this] { return !work.empty(); });
    const std::function<void()> next = std::move(work.front());
    work.erase(work.begin());
    lock.unlock();
    next();
  }

  std::mutex mutex;  // Protects the rest.
  std::condition_variable came;
  std::vector<std::function<void()>> work;
};

TEST_F(AsyncTest, AnExecutorOfNoExecutionContextRunsTheHandler) {
  ForeignLoop loop;
  bool called = false;
  async_load(engine_, request(),
             asio::bind_executor(ForeignLoop::Executor{&loop}, [&](std::exception_ptr error, TransferStats) {
               EXPECT_FALSE(error);
               called = true;
             }));
  EXPECT_FALSE(called);
  loop.run_one();
  EXPECT_TRUE(called);
  EXPECT_TRUE(right());
}

TEST_F(AsyncTest, AHandlerWhoseTypeIsErasedIsCalledOnItsExecutor) {
  // It is left, because nobody is told when the thread that has called execute() has returned from it.
  static asio::io_context& context = *new asio::io_context;
  using Handler = asio::any_completion_handler<void(std::exception_ptr, TransferStats)>;
  for (const bool possible : {true, false}) {  // One that fails at the start does not call its handler there, either.
    context.restart();
    bool called = false;
    LoadRequest wanted = request();
    if (!possible) wanted.files[0].extents[0].target = nullptr;
    asio::post(context, [&] {
      async_load(engine_, wanted, Handler(asio::bind_executor(context, [&](std::exception_ptr error, TransferStats) {
                   EXPECT_EQ(error == nullptr, possible);
                   EXPECT_TRUE(context.get_executor().running_in_this_thread());
                   called = true;
                 })));
      EXPECT_FALSE(called);
    });
    context.run();  // The load keeps it at work.
    EXPECT_TRUE(called);
  }
  EXPECT_TRUE(right());
}

}  // namespace
}  // namespace flashpack
