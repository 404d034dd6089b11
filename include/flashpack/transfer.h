/// Handle of a started load or write.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>

namespace flashpack {

/// How bytes get from files to the engine.
enum class Backend : std::uint8_t {
  kAuto,          ///< io_uring where the kernel and the sandbox allow it, else the workers.
  kIoUring,       ///< io_uring or nothing: Engine's constructor throws where it is refused.
  kPlainIoUring,  ///< The same without setup flags and registered buffers, as on the oldest kernels.
  kWorkers,       ///< pread and pwrite on the worker threads.
};

/// "auto", "io_uring", "plain io_uring" or "workers".
const char* to_string(Backend backend) noexcept;

/// What a transfer did. direct_bytes is what the kernel returned and so counts alignment waste; buffered_bytes is what
/// was delivered.
struct TransferStats {
  std::uint64_t requested_bytes = 0;  ///< Sum of the extents' sizes.
  std::uint64_t direct_bytes = 0;     ///< Moved with O_DIRECT, past the page cache.
  std::uint64_t buffered_bytes = 0;   ///< Moved through the page cache.
  std::uint64_t staged_bytes =
      0;  ///< Of direct_bytes and buffered_bytes: through a staging slot and a copy. The rest went in place.
  std::uint64_t operations = 0;  ///< Chunks handed to the kernel or a worker, retries included.
  std::uint64_t retries = 0;  ///< Of operations: after a short result, EINTR, EAGAIN, a refused direct read, or a page
                              ///< that was not cached after all.
  std::uint64_t verified_bytes = 0;  ///< Of a load: bytes that matched their checksums.
  double seconds = 0;                ///< From start to end, as seen by the caller.
  bool pinned = false;               ///< Slots are page-locked for a CUDA device; without it copies are slow.
  Backend backend = Backend::kAuto;  ///< Not kAuto: what direct reads go to.
  std::string fallback_reason;       ///< Each slower rung that was taken, "<what>: <why>", joined by "; ". Empty when
                                     ///< everything was as asked.
};

/// A snapshot of a running transfer.
struct Progress {
  std::uint64_t done_bytes = 0;   ///< Of total_bytes: in their targets (or in the file).
  std::uint64_t total_bytes = 0;  ///< TransferStats::requested_bytes.
  std::uint32_t outstanding = 0;  ///< Operations the kernel or a worker still holds, and files that it opens or closes.
  bool finished = false;
};

namespace internal {
struct TransferState;
}

/// One transfer in progress. Move-only; it may outlive its engine.
///
/// The memory of the request (targets or sources) belongs to the caller and must stay valid until the transfer has
/// finished: wait() returned or threw, wait_for() returned true, or the destructor returned.
///
/// Thread safety: cancel(), progress() and wait_for() from any thread; everything else, and moving, from one at a time.
/// In a forked child every member but the destructor and error() throws Errc::kUnusable (cancel() does nothing), and
/// the destructor releases nothing.
class Transfer {
 public:
  Transfer() noexcept = default;
  Transfer(Transfer&&) noexcept = default;
  Transfer& operator=(Transfer&&) noexcept;
  /// Cancels and waits until nothing is in flight, unless finished or detached.
  ~Transfer();

  /// False for a default-constructed, moved-from or detached handle, on which only assignment and destruction are
  /// allowed.
  bool valid() const noexcept { return state_ != nullptr; }

  /// Blocks until the transfer has finished. May be called again, with the same result.
  /// A read that is stuck in the kernel cannot be recalled: then this waits for it, however late.
  /// Throws: Error.
  TransferStats wait();

  /// Waits at most that long; true when the transfer has finished. Never throws the transfer's own error.
  bool wait_for(std::chrono::nanoseconds duration);

  /// Stops issuing I/O and asks the kernel to let go of what it holds, which is then drained: at once or, where a
  /// device or a file system does not answer, when it does. wait() then throws Errc::kCancelled.
  /// No effect on a transfer that has finished.
  void cancel() noexcept;

  Progress progress() const;

  /// The error that wait() throws, and its text, for programs without exceptions; both empty after success. Requires:
  /// finished. In a forked child kUnusable.
  std::error_code error() const noexcept;
  std::string error_text() const;

  /// What has been done. Requires: finished, successfully or not.
  TransferStats stats() const;

  /// Leaves the transfer to the engine, which finishes it; the caller's memory must live until Completion::done.
  void detach() noexcept;

 private:
  friend struct internal::TransferState;
  explicit Transfer(std::shared_ptr<internal::TransferState> state) noexcept : state_(std::move(state)) {}
  std::shared_ptr<internal::TransferState> state_;
};

/// Notification that a transfer has finished, successfully or not.
struct Completion {
  /// Called once, on the engine's driver thread, when nothing is in flight any more. `transfer` is a handle of the
  /// engine's own, finished, and valid during the call; wait() on it returns or throws at once. Must not block and must
  /// not destroy the engine.
  virtual void done(Transfer& transfer) noexcept = 0;

 protected:
  ~Completion() = default;
};

}  // namespace flashpack
