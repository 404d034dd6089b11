/// Loads and writes for co_await, in any coroutine and without a library.
///
///   flashpack::TransferStats stats = co_await flashpack::co_load(engine, request);
///
/// Without AwaitOptions::resume, the coroutine goes on on the engine's driver thread, where it must not block, must not
/// destroy the engine, and holds up all other transfers until it is suspended again. That suits a coroutine that only
/// starts the next load or wakes somebody. If the transfer ends while it is being started, the coroutine goes on where
/// it is. With AwaitOptions::resume it always goes on where that leads:
///
///   const flashpack::AwaitOptions options(
///       [&pool](std::coroutine_handle<> waiting) { pool.post([waiting] { waiting.resume(); }); }, stop_token);
///   co_await flashpack::co_load(engine, request, options);
///
/// Give request and options names before you await, as here. GCC 12 has a fault: it destroys an object twice that is
/// written in braces inside a co_await expression.
///
/// co_await returns the transfer's statistics. Throws: Error, as wait() of the transfer, or as start_load() and
/// start_write(), which are called when the coroutine has been suspended. Engine, writer and the request's memory must
/// outlive the transfer. LoadRequest::report_extents has no effect, because a co_await ends once. A coroutine that uses
/// extents as they land starts its load with a Completion, whose landed() resumes it.
///
/// A coroutine that is destroyed while it waits cancels the transfer, and its destruction waits until nothing is in
/// flight; so it must not be destroyed on the driver thread. Destroy it only while nobody can resume it. With
/// AwaitOptions::resume, its handle may still come to your queue during the destruction: remove it from your queue
/// afterwards. Without it, the driver thread may be about to resume the coroutine: request a stop instead. Once
/// AwaitOptions::resume has been called, the handle belongs to that function, which must resume or destroy it.
#pragma once

#include <atomic>
#include <coroutine>
#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <stop_token>
#include <utility>

#include "flashpack/engine.h"

namespace flashpack {

struct AwaitOptions {
  using Resume = std::function<void(std::coroutine_handle<>)>;

  AwaitOptions() = default;
  explicit AwaitOptions(Resume resume_on, std::stop_token stopped_by = std::stop_token())
      : resume(std::move(resume_on)), stop(std::move(stopped_by)) {}
  explicit AwaitOptions(std::stop_token stopped_by) : stop(std::move(stopped_by)) {}

  /// Called once with the coroutine, which it hands to the thread that is to resume it. It is called on the engine's
  /// driver thread or on the thread that awaits, must not block, and must not throw: the process ends if it does.
  Resume resume;
  /// A request to stop cancels the transfer, which ends with Errc::kCancelled as soon as nothing is in flight. If stop
  /// was requested before, nothing is started.
  std::stop_token stop;
};

namespace detail {

/// One transfer that a coroutine waits for. It lives in the coroutine's frame.
template <class Start>
class [[nodiscard]] TransferAwaiter final : public Completion {
 public:
  TransferAwaiter(Start start_transfer, AwaitOptions options)
      : start_transfer_(std::move(start_transfer)), options_(std::move(options)) {}
  TransferAwaiter(const TransferAwaiter&) = delete;
  TransferAwaiter& operator=(const TransferAwaiter&) = delete;
  /// If the coroutine is destroyed while it waits, the destructor of transfer_ cancels the transfer and waits for its
  /// end.
  ~TransferAwaiter() { phase_ = Phase::kGone; }

  bool await_ready() const noexcept { return false; }

  bool await_suspend(std::coroutine_handle<> waiting) noexcept {
    waiting_ = waiting;
    try {
      start();
    } catch (...) {
      error_ = std::current_exception();
      phase_ = Phase::kDone;
    }
    // Until this function sets kWaiting, done() leaves the coroutine suspended.
    if (phase_.exchange(Phase::kWaiting) != Phase::kDone) return true;
    if (!options_.resume) return false;
    resume();
    return true;
  }

  TransferStats await_resume() {
    stopping_.reset();
    if (transfer_.valid()) transfer_.detach();
    if (error_) std::rethrow_exception(std::move(error_));
    return std::move(stats_);
  }

  void done(Transfer& transfer) noexcept override {
    try {
      stats_ = transfer.wait();
    } catch (...) {
      error_ = std::current_exception();
    }
    if (phase_.exchange(Phase::kDone) == Phase::kWaiting) resume();
  }

 private:
  enum class Phase : std::uint8_t { kStarting, kWaiting, kDone, kGone };

  struct Cancel {
    Transfer& transfer;
    void operator()() const noexcept { transfer.cancel(); }
  };

  void start() {
    if (options_.stop.stop_requested()) throw Error(Errc::kCancelled, "stopped before the start");
    transfer_ = start_transfer_(this);
    stopping_.emplace(options_.stop, Cancel{transfer_});
  }

  // The awaiter may be gone before the call that resumes the coroutine returns.
  void resume() noexcept {
    const AwaitOptions::Resume resume_on = std::move(options_.resume);
    resume_on ? resume_on(waiting_) : waiting_.resume();
  }

  Start start_transfer_;
  AwaitOptions options_;
  std::coroutine_handle<> waiting_;
  std::atomic<Phase> phase_ = Phase::kStarting;
  TransferStats stats_;
  std::exception_ptr error_;
  // The order matters: the callback uses the transfer, and what is above must live until the transfer has ended.
  Transfer transfer_;
  std::optional<std::stop_callback<Cancel>> stopping_;
};

}  // namespace detail

/// Engine::start_load() for co_await.
inline auto co_load(Engine& engine, LoadRequest request, AwaitOptions options = AwaitOptions()) {
  auto start = [&engine, request = std::move(request)](Completion* completion) mutable {
    return engine.start_load(std::move(request), completion);
  };
  return detail::TransferAwaiter<decltype(start)>(std::move(start), std::move(options));
}

/// FileWriter::start_write() for co_await.
inline auto co_write(FileWriter& writer, WriteRequest request, AwaitOptions options = AwaitOptions()) {
  auto start = [&writer, request = std::move(request)](Completion* completion) mutable {
    return writer.start_write(std::move(request), completion);
  };
  return detail::TransferAwaiter<decltype(start)>(std::move(start), std::move(options));
}

}  // namespace flashpack
