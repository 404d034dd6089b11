// Callers make mistakes, hurry and forget; each way to wait for a load is tried with that.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <unistd.h>

#include <array>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/io_context.hpp>
#include <chrono>
#include <coroutine>
#include <cstring>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <stdexcept>
#include <stop_token>
#include <string>
#include <system_error>
#include <vector>

#include "flashpack/async.h"
#include "flashpack/coroutine.h"
#include "flashpack/event_queue.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang.h"
#include "tests/support/plug.h"
#include "tests/support/sandbox.h"
#include "tests/support/small_loads.h"
#include "tests/support/spin.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

namespace asio = boost::asio;
using testing::GuardedMemory;
using testing::kHang;
using testing::Plug;

/// One load, started and awaited in one of the ways. The destructor gives up a load that is under way.
class Load {
 public:
  virtual ~Load() = default;
  virtual void start(Engine& engine, LoadRequest request) = 0;
  virtual void cancel() = 0;
  /// Waits for the end, and returns the error, which is empty after success. May be called again.
  virtual std::error_code wait() = 0;
};

std::error_code code_of(const std::exception_ptr& error) {
  if (!error) return {};
  try {
    std::rethrow_exception(error);
  } catch (const Error& thrown) {
    return thrown.code();
  }
}

class TransferLoad final : public Load {
 public:
  void start(Engine& engine, LoadRequest request) override { transfer_ = engine.start_load(std::move(request)); }
  void cancel() override { transfer_.cancel(); }
  std::error_code wait() override {
    if (!transfer_.wait_for(kHang)) throw std::runtime_error("no end comes");
    return transfer_.error();
  }

 private:
  Transfer transfer_;
};

class CompletionLoad final : public Load, Completion {
 public:
  void start(Engine& engine, LoadRequest request) override { transfer_ = engine.start_load(std::move(request), this); }
  void cancel() override { transfer_.cancel(); }
  std::error_code wait() override {
    if (ended_.wait_for(kHang) != std::future_status::ready) throw std::runtime_error("no end comes");
    return ended_.get();
  }

 private:
  void done(Transfer& transfer) noexcept override { end_.set_value(transfer.error()); }

  std::promise<std::error_code> end_;
  std::shared_future<std::error_code> ended_ = end_.get_future().share();
  Transfer transfer_;  // Last, because done() may be called until it is gone.
};

class QueuedLoad final : public Load {
 public:
  void start(Engine& engine, LoadRequest request) override {
    transfer_ = queue_.start_load(engine, std::move(request), 1);
  }
  void cancel() override { transfer_.cancel(); }
  std::error_code wait() override {
    std::array<Event, 4> events;
    pollfd readable{.fd = queue_.fd(), .events = POLLIN, .revents = 0};
    while (!error_) {
      if (::poll(&readable, 1, static_cast<int>(std::chrono::milliseconds(kHang).count())) != 1)
        throw std::runtime_error("no end comes");
      if (queue_.take(events) == 1) error_ = events[0].error;
    }
    return *error_;
  }

 private:
  Transfer transfer_;  // First, so that the queue goes while the transfer is under way.
  EventQueue queue_;
  std::optional<std::error_code> error_;
};

class AsioLoad final : public Load {
 public:
  void start(Engine& engine, LoadRequest request) override {
    async_load(engine, std::move(request),
               asio::bind_cancellation_slot(
                   signal_.slot(), asio::bind_executor(context_, [this](const std::exception_ptr& error,
                                                                        TransferStats) { error_ = code_of(error); })));
  }
  void cancel() override { signal_.emit(asio::cancellation_type::terminal); }
  std::error_code wait() override {
    context_.run_for(kHang);
    if (!error_) throw std::runtime_error("no end comes");
    return *error_;
  }

 private:
  asio::cancellation_signal signal_;
  std::optional<std::error_code> error_;
  asio::io_context context_;
};

class AwaitedLoad final : public Load {
 public:
  ~AwaitedLoad() override {
    if (coroutine_.handle) coroutine_.handle.destroy();
  }
  void start(Engine& engine, LoadRequest request) override { coroutine_ = load(engine, std::move(request)); }
  void cancel() override { stop_.request_stop(); }
  std::error_code wait() override {
    if (error_) return *error_;
    if (resumed_.get_future().wait_for(kHang) != std::future_status::ready) throw std::runtime_error("no end comes");
    coroutine_.handle.resume();
    return error_.value();
  }

 private:
  struct Coroutine {
    struct promise_type {
      Coroutine get_return_object() noexcept { return {std::coroutine_handle<promise_type>::from_promise(*this)}; }
      std::suspend_never initial_suspend() noexcept { return {}; }
      std::suspend_always final_suspend() noexcept { return {}; }
      void return_void() noexcept {}
      void unhandled_exception() noexcept { std::terminate(); }
    };
    std::coroutine_handle<promise_type> handle;
  };

  Coroutine load(Engine& engine, LoadRequest request) {
    const AwaitOptions options([this](std::coroutine_handle<>) { resumed_.set_value(); }, stop_.get_token());
    std::exception_ptr error;
    try {
      co_await co_load(engine, std::move(request), options);
    } catch (const Error&) {
      error = std::current_exception();
    }
    error_ = code_of(error);
  }

  std::stop_source stop_;
  std::promise<void> resumed_;
  std::optional<std::error_code> error_;
  Coroutine coroutine_{};
};

template <class L>
std::unique_ptr<Load> make() {
  return std::make_unique<L>();
}

class MisuseTest : public ::testing::TestWithParam<std::unique_ptr<Load> (*)()> {
 protected:
  MisuseTest() { testing::write_file(path_, bytes_); }

  LoadRequest whole() { return testing::request(path_, *memory_, CachePolicy::kDirect); }
  bool right() const { return testing::right(*memory_, bytes_); }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "file";
  std::vector<std::byte> bytes_ = testing::random_bytes(3 << 20);
  std::unique_ptr<GuardedMemory> memory_ = std::make_unique<GuardedMemory>(bytes_.size());
  std::optional<Engine> engine_{testing::small_engine()};
  std::unique_ptr<Load> load_ = GetParam()();
};

TEST_P(MisuseTest, AnEngineThatIsDestroyedInFlightFinishesTheLoadFirst) {
  load_->start(*engine_, whole());
  engine_.reset();
  EXPECT_TRUE(right());
  EXPECT_EQ(load_->wait(), std::error_code());
}

TEST_P(MisuseTest, ALoadMayBeGivenUpAtAnyMomentAndThenNobodyWritesToItsMemory) {
  for (int round = 0; round < 50; ++round) {
    load_ = GetParam()();
    load_->start(*engine_, whole());
    testing::spin(round * std::chrono::microseconds(10));
    load_.reset();
    ASSERT_TRUE(memory_->intact());
    memory_ = std::make_unique<GuardedMemory>(bytes_.size());
  }
}

TEST_P(MisuseTest, CancellingAndWaitingAgainAfterTheEndChangesNothing) {
  load_->start(*engine_, whole());
  EXPECT_EQ(load_->wait(), std::error_code());
  load_->cancel();
  EXPECT_EQ(load_->wait(), std::error_code());
  EXPECT_TRUE(right());
}

TEST_P(MisuseTest, CancellingTwiceIsCancellingOnce) {
  Plug plug(*engine_);
  load_->start(*engine_, whole());
  load_->cancel();
  load_->cancel();
  plug.pull();
  EXPECT_EQ(load_->wait(), Errc::kCancelled);
}

TEST_P(MisuseTest, ADescriptorMayBeClosedAndItsNumberUsedAgainBeforeTheFileIsRead) {
  testing::write_file(dir_ / "other", testing::random_bytes(bytes_.size(), 2));
  const int fd = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  LoadRequest request = whole();
  request.files[0].fd = fd;
  Plug plug(*engine_);
  load_->start(*engine_, request);
  const int other = ::open((dir_ / "other").c_str(), O_RDONLY | O_CLOEXEC);
  ::dup2(other, fd);
  ::close(other);
  plug.pull();
  EXPECT_EQ(load_->wait(), std::error_code());
  EXPECT_TRUE(right());
  ::close(fd);
}

TEST_P(MisuseTest, ALoadThatTheCallingThreadReadsEndsInTheSameWay) {
  const testing::HeldInCache cached(path_);
  LoadRequest request;
  request.files.push_back({.extents = {{4096, 4096, memory_->data()}}, .handle = engine_->open(path_)});
  load_->start(*engine_, request);
  EXPECT_EQ(load_->wait(), std::error_code());
  EXPECT_TRUE(testing::same_bytes(memory_->data(), bytes_.data() + 4096, 4096));
}

TEST_P(MisuseTest, AForkedChildCanGiveUpItsCopyAndTheParentsLoadGoesOn) {
  Plug plug(*engine_);
  load_->start(*engine_, whole());
  const auto give_up = [this] {
    ::alarm(60);  // It ends a child that waits for the threads of its parent.
    std::error_code error;
    engine_->start_load(whole(), nullptr, error);
    load_.reset();
    engine_.reset();
    return error == Errc::kUnusable ? 0 : 1;
  };
  EXPECT_EQ(testing::run_in_child(give_up), 0);
  const int status = testing::run_in_child_with_same_pid(give_up);
  plug.pull();
  EXPECT_EQ(load_->wait(), std::error_code());
  EXPECT_TRUE(right());
  if (status == testing::kSkip) GTEST_SKIP() << "no child can have the pid of its parent here";
  EXPECT_EQ(status, 0);
}

std::string name_of(const ::testing::TestParamInfo<MisuseTest::ParamType>& info) {
  return std::array{"Transfer", "Completion", "EventQueue", "Asio", "Coroutine"}[info.index];
}

INSTANTIATE_TEST_SUITE_P(, MisuseTest,
                         ::testing::Values(make<TransferLoad>, make<CompletionLoad>, make<QueuedLoad>, make<AsioLoad>,
                                           make<AwaitedLoad>),
                         name_of);

}  // namespace
}  // namespace flashpack
