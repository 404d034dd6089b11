/// The engine: moves extents between files and memory at the speed of the hardware.
///
///   flashpack::Engine engine;
///   auto stats = engine.load({.files = {{.path = "model.flashpack", .extents = {{.offset_bytes = 0, .size_bytes = n,
///   .target = memory}}}}});
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <system_error>
#include <vector>

#include "flashpack/checksums.h"
#include "flashpack/error.h"
#include "flashpack/file_identity.h"
#include "flashpack/file_writer.h"
#include "flashpack/transfer.h"

struct CUstream_st;  // CUDA's tag of cudaStream_t, so that this header needs no CUDA.

namespace flashpack {

/// Where loaded bytes land and stored ones come from.
struct Device {
  enum class Kind : std::uint8_t { kHost, kCuda };
  Kind kind = Kind::kHost;
  int index = 0;  ///< Of a CUDA device, as cudaSetDevice counts.
};

/// One contiguous run of file bytes and where it goes. Any offset and size are valid; the engine hides alignment.
///
/// Fastest when `target` and `offset_bytes` agree modulo 4096 (or the file's direct I/O alignment, where that is
/// larger): whole pages of extents from 128 KiB on are then read straight into the target.
struct Extent {
  std::uint64_t offset_bytes = 0;
  std::uint64_t size_bytes = 0;
  /// `size_bytes` writable bytes, borrowed until the transfer has finished: host memory, or memory of the engine's
  /// device. Host memory that cannot be written to is EFAULT.
  void* target = nullptr;
};

/// The wanted parts of one file. Extents may overlap in the file, never in memory.
struct FileExtents {
  std::filesystem::path path;  ///< Only for messages when `fd` is given.
  std::vector<Extent> extents;
  std::optional<FileIdentity> expected;  ///< When set, another file at `path` is Errc::kFileChanged before it is read.
  /// When set, what is read is held against them, and a difference is Errc::kCorrupt. Only stripes that are read whole
  /// can be: TransferStats::verified_bytes counts them. None when extents overlap in the file, or targets on the host
  /// and on the device take turns in it less than 64 KiB apart; then TransferStats::fallback_reason says so.
  std::optional<Checksums> checksums;
  /// An open, readable descriptor of the file, borrowed until start_load() has returned: for what was learned from it,
  /// such as a footer, to be true of what is loaded, whatever stands at `path` by now. The engine works with a
  /// duplicate and leaves the descriptor's position alone. Negative: `path` is opened.
  int fd = -1;
};

/// Whether reads go through the page cache.
enum class CachePolicy : std::uint8_t {
  kAuto,      ///< Chunk by chunk: from the page cache what is there, the rest past it.
  kDirect,    ///< O_DIRECT wherever the file allows it, cached or not.
  kBuffered,  ///< The page cache for everything.
};

/// What becomes of the page cache of a file that a load has read through it. Direct reads leave it as it is.
enum class AfterLoad : std::uint8_t {
  kKeep,  ///< Left to the kernel: the next load or process finds them.
  kDrop,  ///< The file's pages are given back, cached before or not: for weights that nobody reads again. Dirty and
          ///< mapped pages stay.
};

using Deadline = std::chrono::steady_clock::time_point;

struct LoadRequest {
  std::vector<FileExtents> files;
  CachePolicy cache = CachePolicy::kAuto;
  AfterLoad after = AfterLoad::kKeep;
  /// For targets on a CUDA device, a cudaStream_t: nothing is written before all that is on it when start_load() is
  /// called has come to an end; after that the stream is not touched. So memory that a stream-ordered allocator has
  /// just given, or that kernels still read, may be a target. Null is the legacy default stream of the engine's device,
  /// and so stands for every stream but those made with cudaStreamNonBlocking; cudaStreamPerThread is the calling
  /// thread's. A stream that is being captured into a graph is Errc::kInvalidArgument. When the transfer has finished,
  /// the bytes are there for whatever is launched from then on, on any stream. Targets on the host ask nothing of a
  /// stream.
  CUstream_st* stream = nullptr;
  /// After it no new I/O is issued and the transfer ends with kDeadlineExceeded, as after Transfer::cancel().
  std::optional<Deadline> deadline;
};

/// Fixed for the engine's life. The defaults are right for one local disk; bench/ finds better ones for arrays.
struct EngineOptions {
  Device device;
  /// One read and one staging slot: a power of two from 1 MiB to 1 GiB. Larger costs latency, smaller CPU.
  std::uint32_t chunk_bytes = std::uint32_t{4} << 20;
  /// Direct reads in flight, 1 to 1024, and a few more while fresh memory is filled. Raise to 16-32 for striped arrays.
  std::uint32_t queue_depth = 8;
  /// Upper bound of the engine's own memory; at least two chunks. 0 is 64 MiB, and 96 MiB for a CUDA device. Taken as
  /// it is first needed, or for a CUDA device, page-locked, at the start. Without a device as much again may stand in
  /// for what is stuck in the kernel.
  std::uint64_t staging_bytes = 0;
  /// Threads for page-cache reads, copies and checksums, at most 64. 0 is one per core, but at least 2 and at most 8,
  /// or 12 for a CUDA device, whose link takes more than 8 cores copy and verify.
  std::uint32_t workers = 0;
  Backend backend = Backend::kAuto;
  /// CPUs for the engine's threads; empty leaves them to the scheduler.
  std::vector<int> cpu_affinity;
  /// Where staging memory lies: none is the node of the CUDA device, or for the host wherever the driver thread runs.
  /// A wish: where it cannot be had, fallback_reason() says so.
  std::optional<int> numa_node;
};

/// One device, one driver thread, one ring, one memory budget.
///
/// Functions that throw an Error have a form for programs without exceptions, which puts its code into the last
/// argument; that is empty when all went well. Transfer::wait_for() and Transfer::error() tell how a transfer ended.
///
/// Thread safety: any thread may call any member at any time, but for moving and destruction, which need the engine to
/// themselves; distinct engines are independent. Running out of memory on the engine's threads is fatal. Transfers are
/// served in the order they were started, the next one's reads following on the last of the one before; but loads of at
/// most one chunk do not wait behind larger ones.
///
/// On CUDA an engine works in the primary context of its device, which it makes current for none of the caller's
/// threads beyond a call. End the engine before a cudaDeviceReset(): driver 580 was seen to crash a process (SIGSEGV)
/// that used what was made before it.
///
/// A file system that does not answer holds up the transfers of its files alone. Up to 256 operations can be stuck in
/// it at a time. The destructor waits for those that the kernel may still write to memory for, however long; a thread
/// that opens or closes a file is left to the system after half a second.
///
/// The threads are called flashpack-*. They take none of the process's signals, so that blocking one and waiting for it
/// works as if they were not there; their own faults (SIGSEGV and the like) go where the application's handlers say.
///
/// A fork is safe at any time, for the parent: it gets its bytes, because nothing in it writes to a page that the
/// kernel is reading into. In the child, targets of loads that were under way hold unspecified bytes, and the inherited
/// engine throws Errc::kUnusable and its destructor releases nothing; make a new one there.
class Engine {
 public:
  /// Starts the threads. Throws: Error (kInvalidArgument for options out of range; errno when threads, memory or a
  /// forced backend cannot be had; an error of cuda_category(), or ENOTSUP in a build without CUDA, when the device
  /// cannot).
  explicit Engine(EngineOptions options = {});
  static std::optional<Engine> make(EngineOptions options, std::error_code& error) noexcept;
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;
  /// Finishes what was started, then stops the threads. Cancel transfers first to stop early.
  ~Engine();

  /// Reads every extent and returns when all bytes are in their targets.
  /// On failure the targets hold unspecified bytes, nothing outside them has been touched and nothing is in flight.
  /// Throws: Error.
  TransferStats load(LoadRequest request);

  /// Returns at once. The file is opened when the load's turn comes, and is what stands at its path then, unless
  /// `expected` says otherwise; few files are open at a time. `completion`, if given, is borrowed until called.
  /// Throws: Error (kInvalidArgument for targets that are null or overlap; kUnusable; an error of CUDA about `stream`),
  /// and then never calls `completion`. What is wrong with the files, or with targets on another device, is reported by
  /// the transfer.
  Transfer start_load(LoadRequest request, Completion* completion = nullptr);
  /// Not valid() after an error.
  Transfer start_load(LoadRequest request, Completion* completion, std::error_code& error) noexcept;

  /// Begins a new file that will replace `path`. Its directory must exist. Throws: Error.
  FileWriter create(const std::filesystem::path& path, WriterOptions options = {});
  std::optional<FileWriter> create(const std::filesystem::path& path, WriterOptions options,
                                   std::error_code& error) noexcept;

  /// What the constructor settled on: options as given, with 0 and kAuto resolved.
  const EngineOptions& options() const;
  /// Why a slower backend, or other memory, was taken than asked for; empty when it was not. What one transfer met is
  /// in its stats.
  const std::string& fallback_reason() const;

 private:
  friend class FileWriter;
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flashpack
