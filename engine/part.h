/// A part of a transfer: all that it moves from or to one file, which is opened and planned when its turn comes, and
/// closed when its bytes are there.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "engine/file.h"
#include "engine/plan.h"
#include "engine/router.h"
#include "engine/stripe_sums.h"
#include "engine/unique_fd.h"
#include "flashpack/engine.h"

namespace flashpack::internal {

struct TransferState;
class DiskQueue;

/// The parts of an Error, from which each wait() makes its own: exceptions share their text between copies, and copies
/// of one error may be looked at and dropped by several threads.
struct Failure {
  explicit Failure(const Error& error);
  /// What the exception that is being handled means for the file at `path`.
  static Failure of_exception(const char* operation, const std::filesystem::path& path);
  Error error() const { return Error(code, context, path, offset_bytes); }

  std::error_code code;
  std::string context;
  std::filesystem::path path;
  std::uint64_t offset_bytes;
};

/// An open file that transfers share, and what the driver knows of it.
struct OpenFile {
  explicit OpenFile(File opened) : file(std::move(opened)) {}

  const File file;

  // The driver's.
  DiskQueue* queue = nullptr;  // Serves it, once a transfer moves bytes from or to it.
  std::uint32_t stuck = 0;     // Operations on it that are late or abandoned.
};

/// The driver counts here what is stuck in one file system.
struct FileSystem {
  std::uint32_t stuck = 0;  // Operations that are late or abandoned.
  std::uint32_t late = 0;   // Of these: late.
  std::uint32_t loads = 0;  // Open parts of loads.

  std::size_t held_up_loads() const noexcept { return late > 0 ? loads : 0; }
};

/// A directory or a mount point. A path tells these before its file is open, so what is stuck in opening is counted
/// here.
struct Place {
  std::uint32_t with_threads = 0;     // Parts that are being opened or closed, of those that are counted here.
  std::uint32_t late = 0;             // Those of them that are not answered for.
  FileSystem* file_system = nullptr;  // Where its files turned out to be.

  std::size_t held_up_loads() const noexcept { return file_system ? file_system->held_up_loads() : 0; }
};

/// Files that are open for loads, so that loads of the same path share one. Not by inode alone: some file systems give
/// the same number to two files.
/// Thread safety: any thread.
class FileTable {
 public:
  /// The file of `given` or, without it, what stands at `path` now. May block. Throws: Error, as File::open().
  /// `serve`, if given, is shown the file as soon as it can be read through the page cache; when that is all that was
  /// wanted, and it says so, the file is neither opened for direct reads nor shared.
  std::shared_ptr<OpenFile> open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected,
                                 bool want_direct, UniqueFd given = {},
                                 const std::function<bool(const File&)>& serve = {});

 private:
  std::shared_ptr<OpenFile> find(const std::filesystem::path& path, const std::optional<FileIdentity>& expected,
                                 bool want_direct);

  std::mutex mutex_;
  std::map<std::filesystem::path, std::weak_ptr<OpenFile>> open_;
};

/// The driver's, but for the time that a thread of the pool opens or closes it.
struct Part {
  enum class State : std::uint8_t { kWaiting, kOpening, kOpen, kClosing, kDone };

  // As asked for.
  std::filesystem::path path;  // For messages, too.
  UniqueFd given;              // Open on the file already; then the path is for messages alone.
  std::optional<FileIdentity> expected;
  std::optional<Checksums> checksums;
  CachePolicy cache = CachePolicy::kAuto;
  std::vector<Fragment> extents;  // Until they are planned.

  // These belong to the open file.
  std::shared_ptr<OpenFile> open;
  Plan plan;
  Router router;
  std::optional<StripeSums> sums;  // Where bytes are counted; none where they are not.

  // open_part() and check_part() leave here what they found.
  std::string fallback_reason;
  std::optional<Failure> failure;
  std::uint64_t verified_bytes = 0;
  std::uint64_t read_bytes = 0;       // How many bytes open_part() has read itself; then these are all.
  std::atomic<bool> checked = false;  // The thread that has it has nothing left to do but to close.
  // The first to set it decides: open_part(), which then reads into the extents, or the driver, which then keeps it
  // from that.
  std::atomic<bool> claimed = false;

  // The driver's alone.
  TransferState* transfer = nullptr;
  FileSystem* file_system = nullptr;  // Once it is open.
  std::array<Place*, 2> places{};     // Its directory and mount point, once something is late somewhere.
  bool in_places = false;             // Counted there among those with threads.
  State state = State::kWaiting;
  std::uint64_t turn = 0;                       // Ascending in the order of the starts.
  bool alone = false;                           // No other file of a load was open when it was asked for.
  bool awaited = true;                          // Its transfer does not end before it is done.
  bool late = false;                            // The thread that has it has not answered for kLate.
  std::chrono::steady_clock::time_point since;  // When that thread was asked.
  std::uint32_t chunks_open = 0;                // Not delivered.

  const File& file() const noexcept { return open->file; }
};

/// Opens the file of a load, looks whether it is as expected, and plans its chunks. Where no more than
/// `at_once_bytes` are wanted and all of them are in the page cache, they are read and checked here, and the file is
/// closed. May block for ever.
void open_part(Part& part, FileTable& files, std::uint32_t chunk_bytes, std::uint32_t at_once_bytes = 0) noexcept;

/// Whether a load has got what it asked for: the file is as it was, the bytes fit their checksums. May block for ever.
void check_part(Part& part) noexcept;

/// Whether there are no descriptors left, ours or the system's.
bool no_descriptors(std::error_code error);

}  // namespace flashpack::internal
