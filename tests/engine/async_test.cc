#include "flashpack/async.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/deferred.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/use_future.hpp>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <string>

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
  EXPECT_EQ(testing::read_file(dir_ / "copy"), bytes_);
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

}  // namespace
}  // namespace flashpack
