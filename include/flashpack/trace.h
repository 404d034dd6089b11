/// Engines tell what they do, step by step, to those who want to see it.
///
///   flashpack::ChromeTrace trace("load.json");  // Opens in Perfetto (ui.perfetto.dev) and in chrome://tracing.
///   flashpack::Engine engine({.trace = &trace});
///   engine.load(request);
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>

namespace flashpack {

enum class TraceStage : std::uint8_t {
  kRead,         ///< A chunk is read past the page cache.
  kReadCached,   ///< A chunk is read through the page cache.
  kPopulate,     ///< A worker takes the page faults of memory, before the disk uses it.
  kCopy,         ///< A chunk is copied between staging memory and its place, on the host or a device.
  kChecksum,     ///< A worker adds a chunk to its checksums. A step that touches the bytes anyway does that itself.
  kWrite,        ///< A chunk is written past the page cache.
  kWriteCached,  ///< A chunk is written through the page cache.
  kWait,         ///< A chunk waits for the caller's stream.
  kOpen,         ///< A thread opens a file and plans what is read of it. It reads what is small and cached at once.
  kClose,        ///< A thread closes a file, after a look whether it has changed and its checksums match.
  kTransfer,     ///< A transfer, from its start to its end. For a small load through a FileHandle that was read from
                 ///< the page cache at once, this is the only event.
};
inline constexpr std::size_t kTraceStages = static_cast<std::size_t>(TraceStage::kTransfer) + 1;

/// "read", "read cached", "populate", "copy", "checksum", "write", "write cached", "wait for stream",
/// "open", "close" or "transfer".
const char* to_string(TraceStage stage) noexcept;

/// A step that has ended, or a transfer.
struct TraceEvent {
  TraceStage stage = TraceStage::kRead;
  std::uint32_t engine = 0;    ///< Number of the engine in this process, from 1 on.
  std::uint64_t transfer = 0;  ///< Number of the transfer in its engine, from 1 on.
  std::uint32_t file = 0;      ///< Index of the file in the request; 0 for a transfer.
  std::string_view path;       ///< Path of that file; for a transfer, of its first one. Valid during the call.
  /// The owner of the memory that the bytes of the chunk go to or come from: 0 is the host, 1 EngineOptions::device,
  /// and from 2 on EngineOptions::more_devices, in their order. 0 for files and transfers, which may have several.
  std::uint32_t device = 0;
  /// The row in which a chart shows the step. The steps of a chunk have the same lane, and no two steps of one lane
  /// overlap. 0 for files and transfers, which may overlap.
  std::uint32_t lane = 0;
  std::uint64_t offset_bytes = 0;  ///< Where the step began in the file; 0 for files and transfers.
  /// The bytes that the step has moved or touched; with O_DIRECT also those that alignment adds. 0 if it has failed, if
  /// it was cancelled, or if a chunk was not in the page cache after all.
  std::uint64_t size_bytes = 0;
  using Time = std::chrono::steady_clock::time_point;
  /// When the driver thread gave the step away, and when it saw the end, so that a step includes the time in queues.
  Time begin, end;
  std::uint32_t depth = 0;  ///< Steps of this stage that were under way in the engine at the end, with this one.
  std::error_code error;    ///< For a transfer: how it has ended. Empty after success.
  std::string_view note;    ///< For a transfer: TransferStats::fallback_reason. Valid during the call.
};

/// Gets the events of engines: EngineOptions::trace.
///
/// Thread safety: an engine calls it from its driver thread, one call at a time, and waits for each. A sink that
/// blocks, as in a write to a remote file system, therefore stops all loads of the engine. A sink of several engines is
/// called from several threads at the same time.
class TraceSink {
 public:
  virtual void event(const TraceEvent& event) noexcept = 0;

 protected:
  ~TraceSink() = default;
};

/// Adds events up: time per stage, depth reached, and bytes per stage, per file and per device. Any thread may call any
/// member. In a forked child it is empty, and adds nothing.
class TraceTotals final : public TraceSink {
 public:
  struct Total {
    std::uint64_t steps = 0;
    std::uint64_t bytes = 0;
    double seconds = 0;       ///< Sum of the steps' times; more than the time that has passed if they overlap.
    std::uint32_t depth = 0;  ///< The most steps that an engine had under way at a time.
  };
  using Totals = std::array<Total, kTraceStages>;    // Index: TraceStage.
  static constexpr std::size_t kMostFiles = 10'000;  ///< A bound on memory, and not tuned.

  TraceTotals();
  ~TraceTotals();
  TraceTotals(const TraceTotals&) = delete;
  TraceTotals& operator=(const TraceTotals&) = delete;

  void event(const TraceEvent& event) noexcept override;
  Totals totals() const;
  /// Paths as in the requests. After kMostFiles paths, those of all further ones are added up for an empty path.
  std::map<std::string, Totals, std::less<>> totals_of_files() const;
  /// By TraceEvent::device. If several engines have the sink, equal numbers of theirs are added up.
  std::map<std::uint32_t, Totals> totals_of_devices() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// Writes events to a file in Chrome's trace format (JSON): a process for each engine, with rows for transfers, for
/// files, and for chunks. A chunk is in one row from its read to its copy, and the device is among the arguments of its
/// steps, by which Perfetto can filter and add up.
///
/// Events reach the file when a transfer ends, and when there are 64 KiB of them. The JSON is complete after the
/// destructor, and Perfetto opens it as well if the process was killed before. Any thread may call any member. In a
/// forked child it writes nothing, and error() is empty.
class ChromeTrace final : public TraceSink {
 public:
  /// Replaces what is in the file at `path`, unless another ChromeTrace has it, in this process or another one. Throws:
  /// Error (EWOULDBLOCK if one has it, or another program has a lease of it; ENXIO for a FIFO without a reader;
  /// kInvalidArgument for a disk; errno of open).
  explicit ChromeTrace(const std::filesystem::path& path);
  ~ChromeTrace();
  ChromeTrace(const ChromeTrace&) = delete;
  ChromeTrace& operator=(const ChromeTrace&) = delete;

  void event(const TraceEvent& event) noexcept override;
  /// Writes what has been kept back.
  void flush() noexcept;
  /// The first error of writing, after which nothing more is written; empty without one.
  std::error_code error() const noexcept;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flashpack
