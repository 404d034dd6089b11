/// A part of a transfer: all that it moves from or to one file. The file is opened and planned when its turn comes, and
/// closed when its bytes have been moved.
#pragma once

#include <array>
#include <atomic>
#include <cassert>
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
#include "engine/ground/unique_fd.h"
#include "engine/landing.h"
#include "engine/plan.h"
#include "engine/router.h"
#include "engine/stripe_sums.h"
#include "flashpack/engine.h"

namespace flashpack::internal {

struct TransferState;
class DiskQueue;

/// The values of an Error, from which each wait() makes an Error of its own. An exception that several threads rethrow
/// is one object for all of them, which one thread could change while another reads it.
struct Failure {
  explicit Failure(const Error& error);
  /// Makes a Failure for the file at `path` from the exception that is being handled.
  static Failure of_exception(const char* operation, const std::filesystem::path& path);
  Error error() const { return Error(code, context, path, offset_bytes); }

  std::error_code code;
  std::string context;
  std::filesystem::path path;
  std::uint64_t offset_bytes;
};

/// An open file, with the driver's notes about it. Loads of one path share it, and a FileWriter shares its file with
/// its writes, because any of them may be the last to use the file.
struct OpenFile {
  OpenFile(File opened, DiskQueue* its_queue) : file(std::move(opened)), queue(its_queue) {}

  const File file;

  // Only for the driver.
  DiskQueue* queue;         // The queue that serves the file.
  std::uint32_t stuck = 0;  // Operations on the file that are late or abandoned.
};

/// The driver's counts for one file system. The parts of loads that are open there are held up while one of its
/// operations is late.
class FileSystem {
 public:
  /// The sums over all file systems that the driver needs in every turn of its loop.
  struct Totals {
    std::size_t held_up_loads = 0;  // Parts of loads that are open in a file system in which an operation is late.
    bool answers_again = false;     // The last late operation of a file system has come back; reset by OpenParts.
  };

  /// Borrows the totals, which it keeps up to date.
  explicit FileSystem(Totals& totals) : totals_(totals) {}

  void add_load() noexcept {
    ++loads_;
    totals_.held_up_loads += late_ > 0;
  }
  void remove_load() noexcept {
    assert(loads_ > 0);
    --loads_;
    totals_.held_up_loads -= late_ > 0;
  }
  void add_late() noexcept {
    if (late_++ == 0) totals_.held_up_loads += loads_;
  }
  void remove_late() noexcept {
    assert(late_ > 0);
    if (--late_ > 0) return;
    totals_.held_up_loads -= loads_;
    totals_.answers_again = true;
  }

  /// Parts of loads that are open.
  std::uint32_t loads() const noexcept { return loads_; }
  /// Operations that are late.
  std::uint32_t late() const noexcept { return late_; }
  std::size_t held_up_loads() const noexcept { return late_ > 0 ? loads_ : 0; }

  std::uint32_t stuck = 0;  // Operations that are late or abandoned.

 private:
  Totals& totals_;
  std::uint32_t loads_ = 0;
  std::uint32_t late_ = 0;
};

struct PlaceCounts;

/// Files that are open for loads, so that loads of the same path share one. Files are not looked up by inode alone,
/// because some file systems give two files the same number. Thread safety: any thread.
class FileTable {
 public:
  /// `queue` serves the files.
  explicit FileTable(DiskQueue* queue) : queue_(queue) {}

  /// Opens the file of `given` or, without it, the file that is at `path` now. May block. Throws: Error, as
  /// File::open(). `serve`, if given, is called as soon as the file can be read through the page cache. If it returns
  /// true, it has read all that was wanted, and the file is neither opened for direct reads nor shared.
  std::shared_ptr<OpenFile> open(const std::filesystem::path& path, const std::optional<FileIdentity>& expected,
                                 bool want_direct, UniqueFd given = {},
                                 const std::function<bool(const File&)>& serve = {});

 private:
  std::shared_ptr<OpenFile> find(const std::filesystem::path& path, const std::optional<FileIdentity>& expected,
                                 bool want_direct);

  DiskQueue* const queue_;
  std::mutex mutex_;                                               // Protects the rest.
  std::map<std::filesystem::path, std::weak_ptr<OpenFile>> open_;  // Weak, so that a file is closed after its loads.
};

/// Only the driver uses it, except while a thread of the pool opens or closes the file. After the end of a store, its
/// FileWriter reads the sums.
struct Part {
  enum class State : std::uint8_t {
    kWaiting,   // Until its turn comes.
    kOpening,   // A thread opens the file.
    kAnswered,  // That thread has come back; the driver decides at once what is next.
    kOpen,
    kClosing,  // A thread checks and closes the file.
    kDone,
  };

  // The request.
  std::filesystem::path path;  // Also for messages.
  UniqueFd given;              // A descriptor of the file; if set, `path` is only for messages.
  std::optional<FileIdentity> expected;
  std::optional<Checksums> checksums;  // From stripe `first_stripe` to the last stripe that an extent touches.
  std::uint64_t first_stripe = 0;      // Index in the file.
  CachePolicy cache = CachePolicy::kAuto;
  std::vector<Fragment> extents;       // Moved into the plan later.
  std::uint32_t index = 0;             // Index of the file in the request.
  std::uint32_t reported_extents = 0;  // All extents of the file if the completion wants to know of them, else 0.

  // Set when the file is open.
  std::shared_ptr<OpenFile> open;
  Plan plan;
  Router router;
  std::optional<StripeSums> sums;  // Sums of the bytes that are moved; empty if they are not counted.
  std::optional<Landing> landing;  // Empty if nobody wants to know.

  // The results of open_part() and check_part().
  std::string fallback_reason;
  std::optional<Failure> failure;
  std::uint64_t verified_bytes = 0;
  std::uint64_t read_bytes = 0;       // Bytes that open_part() has read: none or all.
  std::atomic<bool> checked = false;  // The part's thread has only to close the file.
  // Decides between the thread in open_part() and the driver. The thread claims the memory while it reads into it, and
  // a transfer that fails meanwhile waits for the thread. Else the driver claims it when the transfer fails, and then
  // the thread reads nothing, so that the transfer can end although the thread is late.
  std::atomic<bool> memory_claimed = false;

  // Only for the driver.
  TransferState* transfer = nullptr;
  FileSystem* file_system = nullptr;     // Set when the file is open.
  std::array<PlaceCounts*, 2> places{};  // Directory and mount point; set when something is late for the first time.
  bool in_places = false;                // Whether PlaceCounts::with_threads counts the part.
  State state = State::kWaiting;
  std::uint64_t turn = 0;  // Ascends in the order in which transfers start.
  // True if no other file was open whose close could free a descriptor; running out is then an error.
  bool alone = false;
  bool awaited = true;                          // The transfer does not end before the part is done.
  bool late = false;                            // The part's thread has taken longer than kLate.
  std::chrono::steady_clock::time_point since;  // When the part's thread was asked.
  std::uint32_t chunks_open = 0;                // Chunks that have not been delivered yet.

  const File& file() const noexcept { return open->file; }
  /// Whether the caller has claimed the memory first.
  bool claim_memory() noexcept { return !memory_claimed.exchange(true); }
};

/// Opens the file of a load, checks whether it is the expected one, and plans its chunks. If at most `at_once_bytes`
/// are wanted and all of them are in the page cache, this reads and checks them and closes the file. May block for
/// ever.
void open_part(Part& part, FileTable& files, std::uint32_t chunk_bytes, std::uint32_t at_once_bytes = 0) noexcept;

/// Checks after a load that the file has not changed and that the bytes match their checksums. May block for ever.
void check_part(Part& part) noexcept;

/// Compares the stripes with bytes between two offsets of the file that have been read whole with their checksums.
/// Returns the number of their bytes. Throws: Error, kCorrupt. Requires: no thread counts bytes of these stripes now.
std::uint64_t compare_stripes(const Part& part, std::uint64_t begin_bytes, std::uint64_t end_bytes);

/// Whether the process or the system has no descriptors left.
bool no_descriptors(std::error_code error);

}  // namespace flashpack::internal
