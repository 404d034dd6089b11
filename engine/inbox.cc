#include "engine/inbox.h"

#include <cassert>
#include <utility>

#include "engine/transfer_state.h"

namespace flashpack::internal {

// Requires: the mutex is held.
void Inbox::wake() noexcept {
  any_ = true;
  if (sleeper_) sleeper_->wake();
}

void Inbox::start(std::shared_ptr<TransferState> transfer) {
  const std::lock_guard lock(mutex_);
  messages_.started.emplace_back(std::move(transfer))->set_inbox(*this);
  wake();
}

void Inbox::cancel(std::shared_ptr<TransferState> transfer) noexcept {
  const std::lock_guard lock(mutex_);
  transfer->next_cancelled = std::exchange(messages_.cancelled, transfer);
  wake();
}

void Inbox::close() noexcept {
  const std::lock_guard lock(mutex_);
  closing_ = true;
  wake();
}

void Inbox::answer(Answer answer) noexcept {
  const std::lock_guard lock(mutex_);
  if (!sleeper_) return;  // The answer is destroyed when the lock is gone, because to close a file may block.
  messages_.answers.push_back(std::move(answer));
  wake();
}

void Inbox::take(Messages& messages) {
  assert(messages.answers.empty() && messages.started.empty() && !messages.cancelled);
  if (!any_) return;
  const std::lock_guard lock(mutex_);
  any_ = false;
  std::swap(messages, messages_);
}

bool Inbox::end() noexcept {
  if (!closing_) return false;
  const std::lock_guard lock(mutex_);
  if (any_) return false;
  sleeper_ = nullptr;
  return true;
}

}  // namespace flashpack::internal
