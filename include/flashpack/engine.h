/// The engine: moves extents between files and memory at the speed of the hardware.
///
///   flashpack::Engine engine;
///   auto stats = engine.load({.files = {{.path = "model.flashpack", .extents = {{.offset_bytes = 0, .size_bytes = n,
///   .target = memory}}}}});
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <system_error>
#include <vector>

#include "flashpack/checksums.h"
#include "flashpack/error.h"
#include "flashpack/file_handle.h"
#include "flashpack/file_identity.h"
#include "flashpack/file_writer.h"
#include "flashpack/host_memory.h"
#include "flashpack/transfer.h"

struct CUstream_st;  // CUDA's tag of cudaStream_t, so that this header needs no CUDA.

namespace flashpack {

class TraceSink;

/// A device that loads write to and stores read from.
struct Device {
  enum class Kind : std::uint8_t { kHost, kCuda };
  Kind kind = Kind::kHost;
  int index = 0;  ///< Number of a CUDA device, as for cudaSetDevice.
};

/// A contiguous range of file bytes, and the memory that they go to. Any offset and size are valid; the engine hides
/// alignment.
///
/// A load is fastest if `target` and `offset_bytes` are equal modulo 4096 (or modulo the file's direct I/O alignment,
/// if that is larger), because whole pages of extents from 128 KiB on are then read straight into the target, and so
/// are smaller extents of whole pages if nothing else is wanted within 64 KiB of them. HostMemory says where a copy is
/// faster.
struct Extent {
  /// From the beginning of the file or device. For a file inside a container, add the offset where it begins there.
  std::uint64_t offset_bytes = 0;
  std::uint64_t size_bytes = 0;
  /// `size_bytes` writable bytes of host memory or of a device of the engine, borrowed until the transfer has finished.
  /// EFAULT if host memory cannot be written, where the kernel has MADV_POPULATE_WRITE; gVisor has not, and a copy then
  /// ends the process.
  void* target = nullptr;
  /// Extents with a lower value are read before the others of their file, those with the same value in the order of the
  /// file: those of the host first, and then those of devices, which take turns. A cached extent may land before an
  /// uncached one of higher priority.
  std::uint16_t priority = 0;
};

/// The wanted extents of one file. They may overlap in the file, but not in memory.
struct FileExtents {
  /// A regular file or a block device. Only for messages when `fd` is given.
  std::filesystem::path path;
  std::vector<Extent> extents;
  std::optional<FileIdentity> expected;  ///< If set and the file differs, the load fails with Errc::kFileChanged.
  /// The checksums of the file, borrowed until start_load() has returned; null if nothing is to be verified.
  ///
  /// If the load reads all bytes of a stripe, it compares the stripe with its checksum. If they differ, the load fails
  /// with Errc::kCorrupt. TransferStats::verified_bytes says how many bytes have been compared. Stripes that are read
  /// in part are not compared.
  ///
  /// Nothing is compared if the engine has to read some bytes twice, and TransferStats::fallback_reason says so. This
  /// is the case if extents overlap in the file. It may also be the case if extents of two kinds alternate in the file
  /// less than 64 KiB apart, because one read covers such gaps. The kinds are: extents for the host, extents for
  /// each device, and extents of different priorities.
  const Checksums* checksums = nullptr;
  /// A readable descriptor of the file, borrowed until start_load() has returned; if negative, `path` is opened. With
  /// it the load reads the same file as the footer that the caller has read, even if another file is at `path` by now.
  /// The engine uses a duplicate and does not change the descriptor's position, so that one descriptor serves any
  /// number of loads, also at the same time, and none of them looks at the path again. Loads of a path share the
  /// engine's own descriptor as long as one of them is under way.
  ///
  /// The file may have no name, as those of memfd_create(2) and O_TMPFILE, or none any more, and another process may
  /// have opened it. With the flag O_DIRECT, the file is opened again for what has to go through the page cache; if
  /// this process may not, the load fails. For direct reads it is always opened again, by its descriptor; if this
  /// process may not, all reads are buffered.
  int fd = -1;
  /// A file that Engine::open() of the same engine has opened. If it is valid(), `path`, `expected` and `fd` have no
  /// meaning. If no other file is in the request, a load of little that is cached reads it in the calling thread.
  FileHandle handle = {};
};

/// Whether reads go through the page cache.
enum class CachePolicy : std::uint8_t {
  kAuto,      ///< Chunks of which at most a 64th is missing in the page cache are read through it.
  kDirect,    ///< O_DIRECT wherever the file allows it, even for cached bytes.
  kBuffered,  ///< All reads go through the page cache.
};

/// The page cache of files that a load has read through it, after the load. Direct reads do not change it.
enum class AfterLoad : std::uint8_t {
  kKeep,  ///< Pages stay for the next load or process, as long as the kernel keeps them.
  kDrop,  ///< Pages of the file are dropped, even those that were cached before, for files that will not be read again.
          ///< Dirty and mapped pages stay.
};

struct LoadRequest {
  /// Files are read in this order, but a file of which at most one chunk is wanted does not wait for larger ones.
  std::vector<FileExtents> files;
  CachePolicy cache = CachePolicy::kAuto;
  AfterLoad after = AfterLoad::kKeep;
  /// A cudaStream_t for targets on EngineOptions::device; targets on the host ignore it. Nothing is written before all
  /// work that is on the stream when start_load() is called has ended. Therefore a target may be memory that a
  /// stream-ordered allocator has just given, or that kernels still read. The stream is not touched afterwards. Null is
  /// the legacy default stream of that device, which waits for every stream that was not made with
  /// cudaStreamNonBlocking; cudaStreamPerThread is the calling thread's. A stream that is being captured into a graph
  /// is Errc::kInvalidArgument. When the transfer has finished, kernels that are launched on any stream see the bytes.
  CUstream_st* stream = nullptr;
  /// When it passes, the transfer ends as by Transfer::cancel(), but with kDeadlineExceeded.
  std::optional<Deadline> deadline;
  /// Whether Completion::landed() or an EventQueue tells of each extent, so that the first can be used while the rest
  /// is read. Other ways to wait ignore it.
  bool report_extents = false;
  /// Whether a file that fails leaves the others alone: a file that cannot be opened, is not the expected one, ends too
  /// early, or has bytes that cannot be read or do not match their checksums. No more of it is read, and the others
  /// land. Then the transfer has failed all the same, so that nobody takes it for a success: wait() throws the error of
  /// the first such file of the request, Error::files() and Transfer::file_errors() have one for each, and a file that
  /// they do not name has landed whole.
  ///
  /// The targets of a file that has failed hold unspecified bytes, except those extents for which Completion::landed()
  /// has been called, which stay valid as described there. It is not called for any extent of the file after the
  /// failure.
  ///
  /// Everything fails if the transfer is cancelled or its deadline passes, and after an error of CUDA, because
  /// all later copies to that device would fail as well. Error::files() then also names the files that had not landed
  /// whole by that time.
  bool continue_on_error = false;
  /// The streams for targets on EngineOptions::more_devices, in the same order. A stream that is missing or null is the
  /// legacy default stream of its device. A load waits for the streams of all devices on which it has targets before it
  /// writes to any of them. Managed memory (cudaMallocManaged) belongs to the device that it was allocated for if the
  /// engine serves that, else to EngineOptions::device. More streams than devices are Errc::kInvalidArgument.
  std::vector<CUstream_st*> more_streams = {};
};

/// Options for the whole life of an engine. The defaults suit one local disk; flashpack_tune finds better ones for
/// arrays.
struct EngineOptions {
  Device device;
  /// Size of a read and of a staging slot: a power of two from 1 MiB to 1 GiB. Larger chunks cost latency, smaller ones
  /// CPU.
  std::uint32_t chunk_bytes = std::uint32_t{4} << 20;
  /// Direct reads and writes in flight, and chunks whose slots are being populated, 1 to 1024 in all; a few more while
  /// fresh memory is filled, and for a write, which copies chunks to slots meanwhile. Striped arrays may need more:
  /// flashpack_tune finds out.
  std::uint32_t queue_depth = 8;
  /// Upper bound of the engine's staging memory in bytes, at least two chunks. 0 is 64 MiB, or 96 MiB for a CUDA
  /// device. For a CUDA device the memory is allocated and page-locked at the start. Otherwise it is allocated when
  /// first needed. If a file system does not answer, its reads keep their slots. An engine of the host then allocates
  /// up to as much memory again for other reads; one of a CUDA device does not.
  std::uint64_t staging_bytes = 0;
  /// The caller's own memory to be used as staging memory, such as huge pages or page-locked memory, borrowed until the
  /// engine is destroyed. It begins at a page and has 2 to 16,384 chunks; what is left after the last whole chunk is
  /// not used. `staging_bytes` is then 0, and `numa_node` is empty. No other engine may have it at the same time. A
  /// forked child does not inherit it. When the engine has ended, children of a fork inherit the memory again
  /// (MADV_DOFORK).
  ///
  /// The engine asks CUDA whether the first and the last byte of each chunk are page-locked. If all are, it leaves the
  /// memory as it is; otherwise it page-locks it as long as the engine lives.
  /// An engine of the host also has spare slots in memory of its own, which take memory only when reads hang. Without
  /// spare slots, file systems that do not answer can stop all loads that need a slot.
  std::span<std::byte> staging;
  /// Threads for reads through the page cache, copies and checksums, at most 64. 0 is one per core, but at least 2 and
  /// at most 8, or 12 for a CUDA device, whose link is faster than 8 cores.
  std::uint32_t workers = 0;
  Backend backend = Backend::kAuto;
  /// CPUs for the engine's threads; empty leaves them to the scheduler.
  std::vector<int> cpu_affinity;
  /// NUMA node of the staging memory. If empty, it is the node of `device` if that is a CUDA device, or for the host
  /// the node of the thread that uses a slot first. If the system refuses the node, fallback_reason() says so.
  std::optional<int> numa_node;
  /// This sink is told of each step of the engine's work (flashpack/trace.h); borrowed until the engine is destroyed.
  /// Small loads through a FileHandle then always go over the driver thread. Null costs nothing.
  TraceSink* trace = nullptr;
  /// Further CUDA devices, at most 63, for an engine whose `device` is one. A request may then have targets or sources
  /// on any of them and on the host, and all devices share the threads, the queue depth and the staging memory, which
  /// is page-locked once for all of them. With an engine for each device, each has its own
  /// threads and memory, and a load to one does not wait for a load to another. Staging memory of the caller's that is
  /// page-locked already has to be so for all devices (cudaHostRegisterPortable). A device that fails fails the
  /// transfers that use it, and no others. Errc::kInvalidArgument if there is a device twice, or one that is no CUDA
  /// device.
  std::vector<Device> more_devices = {};
  /// The pool of the HostMemory that loads read to. Engines that are to share what is kept get a copy of the same one.
  HostMemoryPool memory_pool = {};
};

/// Serves the host and, if wanted, one or more CUDA devices with one driver thread, one ring and one memory budget.
///
/// load() and start_load() read, open() gives a file for many loads and create() one to write, and the other functions
/// ask. make(), start_load(), open() and create() have a form for programs without exceptions. It puts the error's code
/// into its last argument, which is empty after success. In place of load(), such programs call start_load() and then
/// Transfer::wait_for(), which never throws a transfer's error, and Transfer::error(). FileWriter, EventQueue,
/// read_metadata() and open_checkpoint() have such forms, too. HostMemory has none, but any memory may be a target.
/// All else that throws needs exceptions.
///
/// Thread safety: any thread may call any member at any time, but moves and destruction need the engine to themselves;
/// distinct engines are independent. The process ends if the engine's threads run out of memory. Transfers are served
/// in the order in which they were started, without a pause between them, but loads of at most one chunk do not wait
/// for larger ones.
///
/// With CUDA, an engine uses the primary contexts of its devices; after each call the caller's thread has its own
/// current context again. Destroy the engine before a cudaDeviceReset(), because driver 580 was seen to crash a process
/// (SIGSEGV) that later used objects from before the reset.
///
/// A file system that does not answer delays only the transfers of its own files, as long as at most 256 operations
/// wait for an answer. An engine of a CUDA device cannot replace the slots that such operations keep. If it has
/// four or more, each file system leaves a quarter of those that it finds to others, so that loads to the device become
/// slower with each one that does not answer, and wait, too, when no slot is left. The destructor waits, however long,
/// for operations for which the kernel may still write to memory. When all transfers have finished, it does not wait
/// for a thread that has been opening or closing a file for more than half a second.
///
/// An engine has descriptors of its own. A program that closes descriptors which it does not know (closefrom) has to
/// destroy its engines first, because a thread whose descriptors are gone is not woken any more.
///
/// The threads are called flashpack-*. They block the process's signals, so that the application can block a signal and
/// wait for it. The application's handlers still see the threads' own faults (SIGSEGV and the like).
///
/// The parent of a fork keeps all of its transfers. In the child, targets of loads that were under way hold unspecified
/// bytes. The child's copy of the engine throws Errc::kUnusable, and its destructor releases nothing; make a new engine
/// there.
class Engine {
 public:
  /// Starts the threads. Throws: Error (kInvalidArgument for options out of range; errno when threads, memory or a
  /// forced backend cannot be had; an error of cuda_category(), or ENOTSUP in a build without CUDA, when the device
  /// cannot).
  explicit Engine(EngineOptions options = {});
  static std::optional<Engine> make(EngineOptions options, std::error_code& error) noexcept;
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;
  /// Finishes all transfers, then stops the threads. Cancel transfers first to stop early.
  ~Engine();

  /// Reads every extent and returns when all bytes are in their targets. After an error the targets hold unspecified
  /// bytes (those of files that failed, with LoadRequest::continue_on_error), no other memory has been written and
  /// nothing is in flight. Throws: Error.
  TransferStats load(LoadRequest request);

  /// Returns at once. Each file is opened when its turn comes, because few files are open at a time, so the load reads
  /// the file that is at the path then; `expected` and `fd` guard against another one. `completion`, if given, is
  /// borrowed until called. Throws: Error (kInvalidArgument for what is wrong whatever the files hold: targets that are
  /// null or overlap, checksums that are not of their size, a handle of another engine, streams that are too many or
  /// captured; kUnusable; an error of CUDA about a stream); `completion` is not called then. Errors of the files, and
  /// targets on other devices than the engine's, are the transfer's, and wait() throws them.
  Transfer start_load(LoadRequest request, Completion* completion = nullptr);
  /// The transfer is not valid() after an error.
  Transfer start_load(LoadRequest request, Completion* completion, std::error_code& error) noexcept;

  /// Opens a regular file or a block device for many loads. If `fd` is not negative, it is a readable descriptor of the
  /// file, of which the engine makes a duplicate, and `path` is only for messages. May block in the file system.
  /// Throws: Error (EISDIR for a directory, kInvalidArgument for files of other kinds; kFileChanged if `expected` is
  /// set and differs; kUnusable; errno).
  FileHandle open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected = {}, int fd = -1);
  /// The handle is not valid() after an error.
  FileHandle open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected, int fd,
                  std::error_code& error) noexcept;

  /// Begins a new file that will replace `path`. Its directory must exist. May block in the file system. Throws: Error
  /// (EISDIR if a directory is there, kInvalidArgument if something else than a regular file is; kUnusable; errno, such
  /// as ENOSPC).
  FileWriter create(const std::filesystem::path& path, WriterOptions options = {});
  std::optional<FileWriter> create(const std::filesystem::path& path, WriterOptions options,
                                   std::error_code& error) noexcept;

  /// The options as given, with the chosen values in place of 0 and kAuto; `staging_bytes` stays 0 beside `staging`.
  const EngineOptions& options() const;
  /// How much staging memory is page-locked for CUDA devices; 0 for an engine of the host, and if it could not be
  /// locked.
  std::uint64_t pinned_bytes() const;
  /// Why the backend is slower, or the memory another, than asked for; empty if neither is. Each transfer has its own
  /// reasons in its statistics.
  const std::string& fallback_reason() const;

 private:
  friend class FileWriter;
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flashpack
