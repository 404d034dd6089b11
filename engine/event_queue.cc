#include "flashpack/event_queue.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <deque>
#include <iterator>
#include <list>
#include <mutex>
#include <utility>

#include "engine/ground/error.h"
#include "engine/ground/unique_fd.h"
#include "engine/transfer_state.h"
#include "flashpack/detail/owner_process.h"

namespace flashpack {

/// Listens to one transfer. Shared owns it until the transfer's end.
class EventQueue::Listener final : public Completion {
 public:
  Listener(std::shared_ptr<Shared> shared, std::uint64_t tag) : shared_(std::move(shared)), tag_(tag) {}

  void landed(std::size_t file, std::size_t extent) noexcept override;
  void done(Transfer& transfer) noexcept override;

 private:
  friend class EventQueue::Shared;
  const std::shared_ptr<Shared> shared_;  // Shared with the queue, because either may end first.
  const std::uint64_t tag_;
  std::list<Listener>::iterator place_;  // Its place in the list of Shared.
};

/// The events that wait, and the listeners. The descriptor is readable if and only if events wait.
class EventQueue::Shared {
 public:
  Shared() : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (!fd_) throw Error(internal::errno_code(errno), "eventfd");
  }

  // A child may not take the mutex, which another thread may have held during the fork.
  const detail::OwnerProcess& owner() const noexcept { return owner_; }
  int fd() const noexcept { return fd_.get(); }

  /// Makes a listener to a transfer that is about to start, which is taken out when the transfer has ended or could not
  /// be started. It keeps `self`, which is this object, until then.
  Listener& add_listener(std::shared_ptr<Shared> self, std::uint64_t tag) {
    const std::lock_guard lock(mutex_);
    Listener& listener = listeners_.emplace_back(std::move(self), tag);
    listener.place_ = std::prev(listeners_.end());
    return listener;
  }

  /// Returns the listener. When the result goes, the listener goes, and with it perhaps the last use of this object.
  std::list<Listener> take_out(const Listener& listener) {
    std::list<Listener> taken;
    const std::lock_guard lock(mutex_);
    taken.splice(taken.end(), listeners_, listener.place_);
    return taken;
  }

  /// `ended` is the transfer if it has ended, else null. The descriptor is readable before other threads see the end,
  /// and nobody can take the event before they see it.
  void add(const Event& event, const Transfer* ended = nullptr) {
    const std::lock_guard lock(mutex_);
    if (fd_) waiting_.push_back(event);
    if (waiting_.size() == 1) tell();
    if (ended) internal::TransferState::publish_end(*ended);
  }

  std::size_t take(std::span<Event> events) {
    const std::lock_guard lock(mutex_);
    const std::size_t count = std::min(events.size(), waiting_.size());
    std::copy_n(waiting_.begin(), count, events.begin());
    waiting_.erase(waiting_.begin(), waiting_.begin() + static_cast<std::ptrdiff_t>(count));
    if (count > 0 && waiting_.empty()) untell();
    return count;
  }

  void close() {
    const std::lock_guard lock(mutex_);
    fd_.reset();
    waiting_.clear();
  }

 private:
  // Neither call can block or fail: the counter is 0 or 1.
  void tell() {
    const std::uint64_t one = 1;
    static_cast<void>(!::write(fd_.get(), &one, sizeof one));
  }
  void untell() {
    std::uint64_t count = 0;
    static_cast<void>(!::read(fd_.get(), &count, sizeof count));
  }

  const detail::OwnerProcess owner_;
  std::mutex mutex_;       // Protects the rest.
  internal::UniqueFd fd_;  // Constant until close().
  std::deque<Event> waiting_;
  std::list<Listener> listeners_;
};

void EventQueue::Listener::landed(std::size_t file, std::size_t extent) noexcept {
  shared_->add({.kind = Event::Kind::kLanded, .tag = tag_, .file = file, .extent = extent});
}

void EventQueue::Listener::done(Transfer& transfer) noexcept {
  // The listener and what it shares with the queue must live until this call returns.
  const std::list<Listener> ends_with_this_call = shared_->take_out(*this);
  shared_->add({.kind = Event::Kind::kDone, .tag = tag_, .error = transfer.error()}, &transfer);
}

EventQueue::EventQueue() : shared_(std::make_shared<Shared>()) {}

std::optional<EventQueue> EventQueue::make(std::error_code& error) noexcept {
  return internal::value_or_code<std::optional<EventQueue>>(error, [&] { return EventQueue(); });
}

EventQueue& EventQueue::operator=(EventQueue&& other) noexcept {
  if (this != &other) {
    EventQueue old(std::move(*this));
    shared_ = std::move(other.shared_);
  }
  return *this;
}

EventQueue::~EventQueue() {
  if (!shared_) return;
  if (shared_->owner().is_current()) {
    shared_->close();
  } else {
    detail::leave_to_parent(shared_);
  }
}

int EventQueue::fd() const noexcept { return shared_->fd(); }

std::size_t EventQueue::take(std::span<Event> events) noexcept {
  return shared_->owner().is_current() ? shared_->take(events) : 0;
}

template <class Start>
Transfer EventQueue::start(std::uint64_t tag, Start start_transfer) {
  shared_->owner().require_current("event queue");
  Listener& listener = shared_->add_listener(shared_, tag);
  try {
    return start_transfer(&listener);
  } catch (...) {
    shared_->take_out(listener);
    throw;
  }
}

Transfer EventQueue::start_load(Engine& engine, LoadRequest request, std::uint64_t tag) {
  return start(tag, [&](Completion* listener) { return engine.start_load(std::move(request), listener); });
}

Transfer EventQueue::start_load(Engine& engine, LoadRequest request, std::uint64_t tag,
                                std::error_code& error) noexcept {
  return internal::value_or_code<Transfer>(error, [&] { return start_load(engine, std::move(request), tag); });
}

Transfer EventQueue::start_write(FileWriter& writer, WriteRequest request, std::uint64_t tag) {
  return start(tag, [&](Completion* listener) { return writer.start_write(std::move(request), listener); });
}

Transfer EventQueue::start_write(FileWriter& writer, WriteRequest request, std::uint64_t tag,
                                 std::error_code& error) noexcept {
  return internal::value_or_code<Transfer>(error, [&] { return start_write(writer, std::move(request), tag); });
}

}  // namespace flashpack
