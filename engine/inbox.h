/// Messages of other threads to the driver.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/io_queue.h"
#include "engine/open_part.h"

namespace flashpack::internal {

struct TransferState;

/// Where other threads tell the driver of transfers that start or are cancelled, and of files that have been opened or
/// closed. Each message wakes the driver. A look at an empty inbox takes no lock, because the driver looks in every
/// turn of its loop.
///
/// Threads of the pool may be left behind in a file system that does not answer, so that the inbox may outlive the
/// driver and all that the driver uses. From end() on it takes no more answers and wakes nobody.
class Inbox {
 public:
  /// A thread of the pool has opened or closed the file of this part, which belongs to `transfer`.
  struct Answer {
    std::shared_ptr<TransferState> transfer;  ///< Shared with the driver, because either may be the last to need it.
    Part* part = nullptr;
    Opened opened = {};  ///< Empty after a close.
  };
  struct Messages {
    std::vector<Answer> answers;
    // Shared with the callers' handles, which may be gone when the driver reads the message.
    std::vector<std::shared_ptr<TransferState>> started;  ///< In the order of start().
    /// The first of a list; see TransferState::next_cancelled. Shared for the same reason.
    std::shared_ptr<TransferState> cancelled;
  };

  /// Borrows the queue that the driver sleeps in, which must live until end() has returned true.
  explicit Inbox(Queue& sleeper) : sleeper_(&sleeper) {}

  /// Any thread: hands the transfer to the driver, and lets it borrow this inbox until its end.
  void start(std::shared_ptr<TransferState> transfer);
  /// Any thread: asks the driver to cancel a transfer. Once for each transfer, and not after its end.
  void cancel(std::shared_ptr<TransferState> transfer) noexcept;
  /// Any thread: lets end() return true.
  void close() noexcept;
  /// Any thread: a file has been opened or closed. If the driver has ended, this closes the file.
  void answer(Answer answer) noexcept;

  /// The driver: moves the messages that have come since the last call to `messages`, which must be empty.
  void take(Messages& messages);
  /// The driver, when no transfer is left: ends the inbox, after which no thread wakes the driver, if it has been
  /// closed and no message is left. Returns whether it has.
  bool end() noexcept;

 private:
  void wake() noexcept;

  // Set under the mutex and before the wake, and read by the driver after it. All of them are sequentially consistent,
  // so that a driver that has been woken sees what it was woken for.
  std::atomic<bool> any_ = false;
  std::atomic<bool> closing_ = false;

  // Protects the rest. Wakes happen under it, because the queue may be gone when the driver has ended.
  std::mutex mutex_;
  Queue* sleeper_;  // Null when the driver has ended.
  Messages messages_;
};

}  // namespace flashpack::internal
