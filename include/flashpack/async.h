/// Loads and writes as Boost.Asio operations, for any completion token. No other header needs Boost.
///
///   flashpack::TransferStats stats = co_await flashpack::async_load(engine, request, boost::asio::use_awaitable);
///
/// Give a request a name before you await its operation, as here. GCC 12 has a fault: it destroys an object twice that
/// is written in braces inside a co_await expression.
///
/// The handler is called as void(std::exception_ptr, TransferStats), never inside the initiating call, on its
/// associated executor, or on boost::asio::system_executor if it has none. The exception is an Error. Per-operation
/// cancellation of any type but cancellation_type::none calls Transfer::cancel(); the operation ends with
/// Errc::kCancelled as soon as nothing is in flight. Emit the signal on the handler's strand only, as Asio demands.
///
/// LoadRequest::report_extents has no effect, because an operation has one handler, which is called once. To use
/// extents as they land, start the load with a Completion whose landed() posts to your executor.
///
/// Engine, writer and the request's memory must outlive the operation. An execution context (boost::asio::io_context)
/// may be destroyed while the operation is under way. Its destructor then cancels the operation, waits until nothing is
/// in flight, and destroys the handler, with all that the handler owns, without calling it. It can do so only if the
/// handler's executor tells of its context. The one of an any_completion_handler hides it, and an executor that is not
/// Asio's may have none. The loop that runs such a handler has to outlive the operation, and a little more: nobody is
/// told when the thread that has called execute() has returned from it. It forks only after the operation.
///
/// In a forked child, operations of the parent are left alone: their handlers are neither called nor destroyed, and the
/// context's destructor does not wait for them. To start others on the copy of a context, call its notify_fork(), as
/// Asio demands, and make an engine. Then io_context::run() returns without the parent's operations, too, unless their
/// handlers keep it at work themselves, as coroutines of co_spawn() do.
#pragma once

#include <boost/asio/associated_cancellation_slot.hpp>
#include <boost/asio/associated_executor.hpp>
#include <boost/asio/async_result.hpp>
#include <boost/asio/execution/blocking.hpp>
#include <boost/asio/execution/context.hpp>
#include <boost/asio/execution/executor.hpp>
#include <boost/asio/execution_context.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/query.hpp>
#include <boost/asio/require.hpp>
#include <boost/asio/system_executor.hpp>
#include <boost/version.hpp>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "flashpack/detail/owner_process.h"
#include "flashpack/engine.h"

#if BOOST_VERSION < 108200
#include <boost/asio/awaitable.hpp>
#endif

namespace flashpack {

namespace detail {

using AsyncSignature = void(std::exception_ptr, TransferStats);

/// Knows the operations whose handlers belong to one execution context, so that the context's destructor can wait until
/// they have ended. Thread safety: any thread.
class AsyncOperations final : public boost::asio::execution_context::service {
 public:
  class Operation {
   public:
    virtual ~Operation() = default;
    virtual void cancel() noexcept = 0;
    /// Lets the context run out of work without the operation, which will not end in this process.
    virtual void release_work() = 0;
  };

  using key_type = AsyncOperations;
  inline static boost::asio::execution_context::id id;

  explicit AsyncOperations(boost::asio::execution_context& context) : service(context) {}

  /// Keeps `operation` until take_out(). False if the context is being destroyed; do not start it then.
  bool add(const std::shared_ptr<Operation>& operation) {
    const std::lock_guard lock(mutex_);
    if (!ending_) running_->emplace(operation.get(), operation);
    return !ending_;
  }

  /// To be called when the transfer of `operation` has finished. Returns the operation; the caller posts its handler to
  /// the context and then calls posted(). Null if the context is being destroyed and keeps the operation.
  std::shared_ptr<Operation> take_out(Operation* operation) {
    const std::lock_guard lock(mutex_);
    auto taken = std::move(running_->extract(operation).mapped());
    if (ending_) {
      dropped_.push_back(std::move(taken));
    } else {
      ++posting_;
    }
    changed_.notify_all();
    return taken;
  }

  /// To be called last: the context may be destroyed from then on.
  void posted() {
    const std::lock_guard lock(mutex_);
    --posting_;
    changed_.notify_all();
  }

 private:
  // Shared with the driver, and with a cancellation slot while that slot emits: it may still use an operation that
  // shutdown() ends.
  using Running = std::unordered_map<Operation*, std::shared_ptr<Operation>>;

  // A child that has not been told by notify_fork() may only destroy the context.
  void notify_fork(boost::asio::execution_context::fork_event event) override {
    if (event == boost::asio::execution_context::fork_prepare) {
      std::unique_lock lock(mutex_);
      // A thread that posts holds mutexes of the context, which would stay locked in the child.
      changed_.wait(lock, [this] { return posting_ == 0; });
      return static_cast<void>(lock.release());
    }
    const std::lock_guard lock(mutex_, std::adopt_lock);
    if (event == boost::asio::execution_context::fork_parent) return;
    owner_ = OwnerProcess();
    for (const auto& [operation, owner] : *running_) operation->release_work();
    leave_to_parent(running_);
    running_ = std::make_unique<Running>();
  }

  void shutdown() override {
    if (!owner_.is_current()) return leave_to_parent(running_);  // Nobody ends its operations in the child.
    std::unique_lock lock(mutex_);
    ending_ = true;
    const Running running = *running_;
    lock.unlock();
    for (const auto& [operation, owner] : running) operation->cancel();
    lock.lock();
    changed_.wait(lock, [this] { return running_->empty() && posting_ == 0; });
    const auto dropped = std::move(dropped_);
    lock.unlock();
  }

  OwnerProcess owner_;
  std::mutex mutex_;  // Protects the rest.
  std::condition_variable changed_;
  std::unique_ptr<Running> running_ = std::make_unique<Running>();
  std::vector<std::shared_ptr<Operation>> dropped_;  // Shared with what cancels them.
  std::size_t posting_ = 0;                          // Handlers that are being posted to the context.
  bool ending_ = false;
};

/// The context that `executor` belongs to, or that of system_executor if `executor` does not tell.
template <class Executor>
boost::asio::execution_context& context_of(const Executor& executor) {
  if constexpr (boost::asio::can_query_v<const Executor&, boost::asio::execution::context_t>) {
    return boost::asio::query(executor, boost::asio::execution::context);
  } else {
    return boost::asio::query(boost::asio::system_executor(), boost::asio::execution::context);
  }
}

/// boost::asio::post(), which an executor that cannot promise to return at once does not have, as that of an
/// any_completion_handler. Such a one is called on a thread of system_executor, where it holds up nobody.
template <class Executor, class Work>
void post_to(const Executor& executor, Work work) {
  namespace execution = boost::asio::execution;
  if constexpr (execution::is_executor<Executor>::value &&
                !boost::asio::can_require_v<const Executor&, execution::blocking_t::never_t>) {
    boost::asio::post(boost::asio::system_executor(),
                      [executor, work = std::move(work)]() mutable { executor.execute(std::move(work)); });
  } else {
    boost::asio::post(executor, std::move(work));
  }
}

template <class Handler>
class AsyncOperation final : public Completion,
                             public AsyncOperations::Operation,
                             public std::enable_shared_from_this<AsyncOperation<Handler>> {
 public:
  explicit AsyncOperation(Handler handler)
      : handler_(std::move(handler)),
        work_(boost::asio::make_work_guard(
            boost::asio::get_associated_executor(handler_, boost::asio::system_executor()))),
        operations_(boost::asio::use_service<AsyncOperations>(context_of(work_.get_executor()))) {}

  template <class Start>
  void start(Start start_transfer) {
    if (!operations_.add(this->shared_from_this())) return;
    try {
      // The slot is connected before the start, because afterwards the handler may already run on another thread.
      if (auto slot = boost::asio::get_associated_cancellation_slot(handler_); slot.is_connected()) {
        slot.assign([operation = this->weak_from_this()](boost::asio::cancellation_type type) {
          if (const auto self = operation.lock(); self && type != boost::asio::cancellation_type::none) self->cancel();
        });
      }
      Transfer transfer = start_transfer(this);
      const std::lock_guard lock(mutex_);
      if (ended_) return transfer.detach();
      transfer_ = std::move(transfer);
      if (cancelled_) transfer_.cancel();
    } catch (...) {
      finish(std::current_exception(), {});
    }
  }

  void done(Transfer& transfer) noexcept override {
    std::exception_ptr error;
    TransferStats stats;
    try {
      stats = transfer.wait();
    } catch (...) {
      error = std::current_exception();
    }
    finish(std::move(error), std::move(stats));
  }

  void cancel() noexcept override {
    const std::lock_guard lock(mutex_);
    cancelled_ = true;
    if (transfer_.valid()) transfer_.cancel();
  }

  // Posted, not done here: without the guard, run() in a forked child could return before the child has given it work.
  void release_work() override {
    post_to(work_.get_executor(), [this] { work_.reset(); });
  }

 private:
  void finish(std::exception_ptr error, TransferStats stats) {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
      transfer_.detach();
    }
    AsyncOperations& operations = operations_;
    auto self = std::static_pointer_cast<AsyncOperation>(operations.take_out(this));
    if (!self) return;
    post_handler(std::move(self), std::move(error), std::move(stats));
    operations.posted();
  }

  // The copy of the executor must be gone before the end is told, because from then on its context may be destroyed.
  static void post_handler(std::shared_ptr<AsyncOperation> self, std::exception_ptr error, TransferStats stats) {
    const auto executor = self->work_.get_executor();
    post_to(executor, [self = std::move(self), error = std::move(error), stats = std::move(stats)]() mutable {
      if (auto slot = boost::asio::get_associated_cancellation_slot(self->handler_); slot.is_connected()) slot.clear();
      Handler handler = std::move(self->handler_);
      self->work_.reset();
      self.reset();
      std::move(handler)(std::move(error), std::move(stats));
    });
  }

  Handler handler_;
  boost::asio::executor_work_guard<boost::asio::associated_executor_t<Handler, boost::asio::system_executor>> work_;
  AsyncOperations& operations_;
  std::mutex mutex_;  // Protects the rest.
  Transfer transfer_;
  bool ended_ = false;
  bool cancelled_ = false;
};

template <class Token, class Start>
auto async_transfer(Token&& token, Start start) {
  return boost::asio::async_initiate<Token, AsyncSignature>(
      [](auto handler, Start start_transfer) {
        std::make_shared<AsyncOperation<decltype(handler)>>(std::move(handler))->start(std::move(start_transfer));
      },
      token, std::move(start));
}

}  // namespace detail

/// Engine::start_load() as an asynchronous operation.
template <boost::asio::completion_token_for<detail::AsyncSignature> Token>
auto async_load(Engine& engine, LoadRequest request, Token&& token) {
  return detail::async_transfer(std::forward<Token>(token),
                                [&engine, request = std::move(request)](Completion* completion) mutable {
                                  return engine.start_load(std::move(request), completion);
                                });
}

/// FileWriter::start_write() as an asynchronous operation.
template <boost::asio::completion_token_for<detail::AsyncSignature> Token>
auto async_write(FileWriter& writer, WriteRequest request, Token&& token) {
  return detail::async_transfer(std::forward<Token>(token),
                                [&writer, request = std::move(request)](Completion* completion) mutable {
                                  return writer.start_write(std::move(request), completion);
                                });
}

}  // namespace flashpack

#if BOOST_VERSION < 108200
/// Before Boost 1.82, a co_await of a boost::asio::deferred operation whose handler takes an exception and a value does
/// not compile, because Asio looks for the exception in the wrong place (chriskohlhoff/asio#1190).
template <class Executor>
class boost::asio::detail::awaitable_async_op_handler<flashpack::detail::AsyncSignature, Executor>
    : public awaitable_async_op_handler<int(std::exception_ptr, flashpack::TransferStats), Executor> {
  using Base = awaitable_async_op_handler<int(std::exception_ptr, flashpack::TransferStats), Executor>;

 public:
  using Base::Base;

  static flashpack::TransferStats resume(typename Base::result_type& result) {
    if (*result.ex_) std::rethrow_exception(*result.ex_);
    return std::move(*result.value_);
  }
};
#endif
