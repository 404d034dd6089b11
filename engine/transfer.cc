#include "flashpack/transfer.h"

#include <unistd.h>

#include <algorithm>

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

namespace internal {

Failure::Failure(const Error& error)
    : code(error.code()), context(error.what()), path(error.path()), offset_bytes(error.offset_bytes()) {
  context.resize(context.size() - code.message().size() - 2);  // what() is the context, ": " and the message.
}

void TransferState::finish(std::optional<Failure> result) {
  {
    const std::lock_guard lock(mutex);
    outcome = std::move(result);
    ended = true;
    ended_by = std::this_thread::get_id();
    inbox = nullptr;
  }
  if (completion) {
    Transfer transfer = handle(shared_from_this());
    completion->done(transfer);
  }
  {
    const std::lock_guard lock(mutex);
    published = true;
  }
  published_changed.notify_all();
}

void TransferState::cancel(const std::shared_ptr<TransferState>& state) noexcept {
  if (state->cancel_requested.exchange(true)) return;
  const std::lock_guard lock(state->mutex);
  if (state->inbox) state->inbox->cancel(state);
}

void TransferState::note_fallback(const std::string& reason) {
  std::string& all = stats.fallback_reason;
  if (reason.empty() || all.find(reason) != std::string::npos) return;
  all.append(all.empty() ? "" : "; ").append(reason);
}

void TransferState::report_at_once(const Part& part) const {
  for (std::uint32_t extent = 0; extent < part.reported_extents; ++extent) {
    if (!part.landing || part.landing->has_landed(extent)) completion->landed(part.index, extent);
  }
}

void TransferState::report_landed(Part& part, const Chunk& chunk) const {
  if (!part.landing) return;
  const auto index = static_cast<std::uint32_t>(&chunk - part.plan.chunks.data());
  const std::span<const std::uint32_t> landed = part.landing->deliver(index);
  if (!landed.empty() && part.sums)
    compare_stripes(part, part.plan.chunks[landed.front()].offset_bytes, end_of(part.plan.chunks[landed.back()]));
  for (const std::uint32_t each : landed) {
    for (const Fragment& fragment : part.plan.fragments_of(part.plan.chunks[each])) {
      if (part.landing->land(fragment)) completion->landed(part.index, fragment.extent);
    }
  }
}

void TransferState::require_owner() const {
  if (::getpid() != owner) throw Error(Errc::kUnusable, "transfer of the parent process, used after fork");
}

}  // namespace internal

Transfer& Transfer::operator=(Transfer&& other) noexcept {
  if (this != &other) {
    Transfer old(std::move(*this));
    state_ = std::move(other.state_);
  }
  return *this;
}

Transfer::~Transfer() {
  if (!state_ || ::getpid() != state_->owner) return;
  internal::TransferState::cancel(state_);
  std::unique_lock lock(state_->mutex);
  state_->published_changed.wait(lock, [this] { return state_->visible(); });
}

TransferStats Transfer::wait() {
  state_->require_owner();
  std::unique_lock lock(state_->mutex);
  state_->published_changed.wait(lock, [this] { return state_->visible(); });
  if (state_->outcome) throw state_->outcome->error();
  return state_->stats;
}

bool Transfer::wait_for(std::chrono::nanoseconds duration) {
  state_->require_owner();
  std::unique_lock lock(state_->mutex);
  // The sum of now and a very long duration would overflow.
  const auto bounded = std::min<std::chrono::nanoseconds>(duration, std::chrono::hours(24 * 365));
  return state_->published_changed.wait_for(lock, bounded, [this] { return state_->visible(); });
}

void Transfer::cancel() noexcept {
  if (state_ && ::getpid() == state_->owner) internal::TransferState::cancel(state_);
}

Progress Transfer::progress() const {
  state_->require_owner();
  const std::lock_guard lock(state_->mutex);
  return {.done_bytes = state_->done_bytes.load(),
          .total_bytes = state_->total_bytes,
          .outstanding = state_->outstanding.load(),
          .finished = state_->visible()};
}

std::error_code Transfer::error() const noexcept {
  if (::getpid() != state_->owner) return Errc::kUnusable;
  const std::lock_guard lock(state_->mutex);
  return state_->outcome ? state_->outcome->code : std::error_code();
}

std::string Transfer::error_text() const {
  state_->require_owner();
  const std::lock_guard lock(state_->mutex);
  return state_->outcome ? state_->outcome->error().what() : std::string();
}

TransferStats Transfer::stats() const {
  state_->require_owner();
  const std::lock_guard lock(state_->mutex);
  return state_->stats;
}

void Transfer::detach() noexcept { state_.reset(); }

}  // namespace flashpack
