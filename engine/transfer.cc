#include "flashpack/transfer.h"

#include "engine/ground/reasons.h"
#include "engine/inbox.h"
#include "engine/transfer_state.h"

namespace flashpack {

const char* to_string(Backend backend) noexcept {
  switch (backend) {
    case Backend::kAuto:
      return "auto";
    case Backend::kIoUring:
      return "io_uring";
    case Backend::kPlainIoUring:
      return "plain io_uring";
    case Backend::kWorkers:
      return "workers";
  }
  return "";
}

TransferStats& TransferStats::operator+=(const TransferStats& other) {
  requested_bytes += other.requested_bytes;
  direct_bytes += other.direct_bytes;
  buffered_bytes += other.buffered_bytes;
  staged_bytes += other.staged_bytes;
  operations += other.operations;
  retries += other.retries;
  verified_bytes += other.verified_bytes;
  pinned = other.pinned;
  backend = other.backend;
  internal::add_reason(fallback_reason, other.fallback_reason);
  return *this;
}

namespace {

void request_cancel(const std::shared_ptr<internal::TransferState>& state) noexcept {
  if (state->cancel_requested.exchange(true)) return;
  state->with_inbox([&](internal::Inbox& inbox) { inbox.cancel(state); });
}

}  // namespace

Transfer& Transfer::operator=(Transfer&& other) noexcept {
  if (this != &other) {
    Transfer old(std::move(*this));
    state_ = std::move(other.state_);
  }
  return *this;
}

Transfer::~Transfer() {
  if (!state_) return;
  if (!state_->owner.is_current()) {
    detail::leave_to_parent(state_);
  } else {
    request_cancel(state_);
    state_->end.wait();
  }
}

TransferStats Transfer::wait() {
  state_->owner.require_current("transfer");
  state_->end.wait();
  if (const internal::Failure* const failure = state_->end.failure()) throw failure->error();
  return state_->end.stats();
}

bool Transfer::wait_for(std::chrono::nanoseconds duration) {
  state_->owner.require_current("transfer");
  return state_->end.wait_for(duration);
}

void Transfer::cancel() noexcept {
  if (state_ && state_->owner.is_current()) request_cancel(state_);
}

Progress Transfer::progress() const {
  state_->owner.require_current("transfer");
  const bool finished = state_->end.is_visible();  // First, so that the counts of a finished transfer are final.
  return {.done_bytes = state_->done_bytes.load(),
          .total_bytes = state_->request.total_bytes,
          .outstanding = state_->outstanding.load(),
          .finished = finished};
}

std::error_code Transfer::error() const noexcept {
  if (!state_->owner.is_current()) return Errc::kUnusable;
  const internal::Failure* const failure = state_->end.failure();
  return failure ? failure->code : std::error_code();
}

std::vector<FileError> Transfer::file_errors() const {
  state_->owner.require_current("transfer");
  const internal::Failure* const failure = state_->end.failure();
  return failure ? failure->file_errors() : std::vector<FileError>();
}

std::string Transfer::error_text() const {
  state_->owner.require_current("transfer");
  const internal::Failure* const failure = state_->end.failure();
  return failure ? failure->error().what() : std::string();
}

TransferStats Transfer::stats() const {
  state_->owner.require_current("transfer");
  return state_->end.stats();
}

void Transfer::detach() noexcept {
  if (state_ && !state_->owner.is_current()) return detail::leave_to_parent(state_);
  state_.reset();
}

}  // namespace flashpack
