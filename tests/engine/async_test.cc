#include "flashpack/async.h"

#include <gtest/gtest.h>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/use_future.hpp>
#include <cstring>

#include "tests/support/guarded_memory.h"
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
  bool right() const { return memory_.intact() && std::memcmp(memory_.data(), bytes_.data(), bytes_.size()) == 0; }

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
        const SourceExtent all{.size_bytes = bytes_.size(), .source = bytes_.data()};
        co_await async_write(writer, std::vector(1, all), asio::use_awaitable);
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
