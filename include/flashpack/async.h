/// Loads and writes as Boost.Asio operations, for any completion token. The only header that needs Boost.
///
///   flashpack::TransferStats stats = co_await flashpack::async_load(engine, request, boost::asio::use_awaitable);
///
/// The handler is called as void(std::exception_ptr, TransferStats), never inside the initiating call, on its
/// associated executor (boost::asio::system_executor where it has none). The exception is an Error. Per-operation
/// cancellation of every type but none becomes Transfer::cancel(); the operation then ends with Errc::kCancelled when
/// nothing is in flight. As always with Asio, a cancellation signal may be emitted only on the handler's strand.
/// Engine, writer and the request's memory must outlive the operation.
#pragma once

#include <boost/asio/associated_cancellation_slot.hpp>
#include <boost/asio/associated_executor.hpp>
#include <boost/asio/async_result.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/system_executor.hpp>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "flashpack/engine.h"

namespace flashpack {

namespace detail {

using AsyncSignature = void(std::exception_ptr, TransferStats);

template <class Handler>
class AsyncOperation final : public Completion, public std::enable_shared_from_this<AsyncOperation<Handler>> {
 public:
  explicit AsyncOperation(Handler handler)
      : handler_(std::move(handler)),
        work_(boost::asio::make_work_guard(
            boost::asio::get_associated_executor(handler_, boost::asio::system_executor()))) {}

  template <class Start>
  void start(Start start_transfer) {
    alive_ = this->shared_from_this();
    // Before the start: afterwards the handler may already be running elsewhere.
    if (auto slot = boost::asio::get_associated_cancellation_slot(handler_); slot.is_connected()) {
      slot.assign([operation = this->weak_from_this()](boost::asio::cancellation_type type) {
        if (const auto self = operation.lock(); self && type != boost::asio::cancellation_type::none) self->cancel();
      });
    }
    try {
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

 private:
  void cancel() {
    const std::lock_guard lock(mutex_);
    cancelled_ = true;
    if (transfer_.valid()) transfer_.cancel();
  }

  void finish(std::exception_ptr error, TransferStats stats) {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
      transfer_.detach();
    }
    auto executor = work_.get_executor();
    boost::asio::post(
        executor, [self = std::move(alive_), error = std::move(error), stats = std::move(stats)]() mutable {
          if (auto slot = boost::asio::get_associated_cancellation_slot(self->handler_); slot.is_connected())
            slot.clear();
          Handler handler = std::move(self->handler_);
          self->work_.reset();
          self.reset();
          std::move(handler)(std::move(error), std::move(stats));
        });
  }

  Handler handler_;
  boost::asio::executor_work_guard<boost::asio::associated_executor_t<Handler, boost::asio::system_executor>> work_;
  std::shared_ptr<AsyncOperation> alive_;  // Until the handler is on its way: the engine knows this by a bare pointer.
  std::mutex mutex_;                       // Protects the rest.
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

/// FileWriter::start_write() as an asynchronous operation. Sources on a CUDA device are read when all that is on the
/// legacy default stream now has come to an end.
template <boost::asio::completion_token_for<detail::AsyncSignature> Token>
auto async_write(FileWriter& writer, std::vector<SourceExtent> extents, Token&& token) {
  return detail::async_transfer(std::forward<Token>(token),
                                [&writer, extents = std::move(extents)](Completion* completion) mutable {
                                  return writer.start_write(std::move(extents), completion);
                                });
}

}  // namespace flashpack
