/// Handle of a started load or write.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include "flashpack/error.h"

namespace flashpack {

using Deadline = std::chrono::steady_clock::time_point;

/// How direct reads and writes are carried out.
enum class Backend : std::uint8_t {
  kAuto,          ///< io_uring where the kernel and the sandbox allow it, else the workers.
  kIoUring,       ///< io_uring; if it is refused, Engine's constructor throws.
  kPlainIoUring,  ///< io_uring without setup flags and registered buffers, as on the oldest kernels.
  kWorkers,       ///< pread and pwrite on the worker threads.
};

/// "auto", "io_uring", "plain io_uring" or "workers".
const char* to_string(Backend backend) noexcept;

/// Statistics of a transfer. direct_bytes counts all bytes that the kernel moved, also those that alignment adds.
/// buffered_bytes counts the bytes that were asked for and, to and from a device, the small gaps between them.
struct TransferStats {
  std::uint64_t requested_bytes = 0;  ///< Sum of the extents' sizes.
  std::uint64_t direct_bytes = 0;     ///< Bytes moved with O_DIRECT, past the page cache.
  std::uint64_t buffered_bytes = 0;   ///< Bytes moved through the page cache.
  std::uint64_t staged_bytes = 0;     ///< Bytes of these two that went through a staging slot and a copy.
  std::uint64_t operations = 0;       ///< Reads and writes of chunks, retries included, and 1 for each file that was
                                      ///< read at once from the page cache.
  std::uint64_t retries = 0;  ///< Operations that repeat one which gave a short result, EINTR or EAGAIN, was refused as
                              ///< direct I/O, or found a page not cached.
  std::uint64_t verified_bytes = 0;  ///< Bytes of a load that matched their checksums.
  double seconds = 0;                ///< Seconds from the start to the end of the transfer.
  bool pinned = false;  ///< Whether slots are page-locked for a CUDA device, as Engine::pinned_bytes() tells; without
                        ///< that, copies are slow. Always false for an engine of the host.
  Backend backend = Backend::kAuto;  ///< The backend of direct I/O; never kAuto once the transfer has started.
  std::string fallback_reason;  ///< Each slower way that was taken, as "<what>: <why>", joined by "; "; else empty.

  /// Adds the figures of another transfer of the same engine, and its reasons. `seconds` stays, because transfers may
  /// run at the same time.
  TransferStats& operator+=(const TransferStats& other);
};

/// A snapshot of a running transfer.
struct Progress {
  std::uint64_t done_bytes = 0;   ///< Bytes that are in their targets, or for a write in the file.
  std::uint64_t total_bytes = 0;  ///< TransferStats::requested_bytes.
  std::uint32_t outstanding = 0;  ///< Chunks under way, and files that are being opened or closed.
  bool finished = false;
};

namespace internal {
struct TransferState;
}

/// One transfer in progress. Move-only; it may outlive its engine. wait(), wait_for(), cancel() and detach() act; the
/// other functions ask.
///
/// The memory of the request (targets or sources) belongs to the caller and must stay valid until the transfer has
/// finished: wait() returned or threw, wait_for() returned true, or the destructor returned.
///
/// Thread safety: any thread may call cancel(), progress() and wait_for(); other members, and moves, are for one thread
/// at a time. In a forked child, members that may throw do so, with Errc::kUnusable; error() returns it, cancel() does
/// nothing, and neither the destructor nor detach() releases anything.
class Transfer {
 public:
  Transfer() noexcept = default;
  Transfer(Transfer&&) noexcept = default;
  Transfer& operator=(Transfer&&) noexcept;
  /// Cancels and waits until nothing is in flight, unless the transfer has finished or was detached.
  ~Transfer();

  /// False for a default-constructed, moved-from or detached handle, on which only assignment, destruction,
  /// cancel() and detach() are allowed.
  bool valid() const noexcept { return state_ != nullptr; }

  /// Blocks until the transfer has finished. May be called again, with the same result. A read that the kernel
  /// does not give back cannot be ended, so this waits for it, however long that takes. Throws: Error.
  TransferStats wait();

  /// Waits for at most `duration`. True if the transfer has finished. Never throws the transfer's own error.
  bool wait_for(std::chrono::nanoseconds duration);

  /// Returns at once. No more I/O is issued, operations in flight are cancelled, and when the last of them has come
  /// back, wait() throws Errc::kCancelled. Operations of a device or file system that does not answer take until it
  /// does. A transfer that has finished is not affected.
  void cancel() noexcept;

  Progress progress() const;

  /// The error that wait() throws, and its text, for programs without exceptions; both are empty after success.
  /// Requires: the transfer has finished. In a forked child the error is kUnusable.
  std::error_code error() const noexcept;
  std::string error_text() const;
  /// The errors of single files, as Error::files() has them. Requires: the transfer has finished.
  std::vector<FileError> file_errors() const;

  /// The statistics. Requires: the transfer has finished, successfully or not.
  TransferStats stats() const;

  /// Leaves the transfer to the engine, which finishes it; the caller's memory must live until Completion::done.
  void detach() noexcept;

 private:
  friend struct internal::TransferState;
  explicit Transfer(std::shared_ptr<internal::TransferState> state) noexcept : state_(std::move(state)) {}
  std::shared_ptr<internal::TransferState> state_;  // Shared with the engine, because either may end first.
};

/// Notification that a transfer has finished, successfully or not, and that single extents of a load have landed. A
/// runtime that computes on the first layers while the others are read:
///
///   struct Layers final : flashpack::Completion {
///     void landed(std::size_t, std::size_t layer) noexcept override { tell(ready[layer]); }
///     void done(flashpack::Transfer& load) noexcept override {
///       failed = static_cast<bool>(load.error());
///       for (auto& layer : ready) tell(layer);
///     }
///     static void tell(std::atomic<bool>& layer) { layer = true, layer.notify_one(); }
///     std::array<std::atomic<bool>, 80> ready{};
///     std::atomic<bool> failed = false;
///   } layers;
///   flashpack::Transfer load = engine.start_load({.files = {file}, .report_extents = true}, &layers);
///   for (std::size_t layer = 0; layer < 80; ++layer) {  // file.extents has one extent for each layer.
///     layers.ready[layer].wait(false);
///     if (layers.failed) break;
///     compute(layer);
///   }
///   load.wait();
struct Completion {
  /// Called once, on the engine's driver thread, when nothing is in flight any more. `transfer` is the engine's own
  /// handle of the finished transfer, valid during the call; wait() on it returns or throws at once. It may be moved
  /// from, to be kept. The call must not block and must not destroy the engine.
  virtual void done(Transfer& transfer) noexcept = 0;

  /// Called for loads with LoadRequest::report_extents, on the engine's driver thread, when extent `extent` of file
  /// `file` of the request has landed: all of its bytes are in host memory for any thread, or in device memory for work
  /// that is launched on any stream from now on. Each extent lands once; those of no bytes do, too. All have landed
  /// before done() is called, unless the transfer has failed: then those that have landed are whole, and the others
  /// are unspecified.
  ///
  /// Extents land as soon as they can. Their reads begin in the order that Extent::priority has, but several are under
  /// way at a time, and what is cached does not wait for the disk, so that a later one may land first. It is not kept
  /// back for those before it, because it may be the one that somebody waits for; a caller who needs an order waits in
  /// that order, as above.
  ///
  /// If the file has checksums, an extent lands only after its stripes have matched, except those that are not read
  /// whole. The multiples of EngineOptions::chunk_bytes cut the file into cells, and the engine compares the stripes of
  /// a cell when it has read all that the request wants of that cell. Therefore an extent may wait for others in its
  /// cell.
  ///
  /// The bytes of an extent that has landed stay valid even if the transfer fails later. The only exception is
  /// Errc::kFileChanged, because the engine finds out only at the end that the file has been changed during the load.
  ///
  /// The call must not block. It may call Transfer::cancel(), after which other extents may still land, and may start
  /// transfers, but must not destroy this one or the engine.
  virtual void landed([[maybe_unused]] std::size_t file, [[maybe_unused]] std::size_t extent) noexcept {}

 protected:
  ~Completion() = default;
};

}  // namespace flashpack
