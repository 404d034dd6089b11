/// A part of a transfer: all that it moves from or to one file. The file is opened and planned when its turn comes, and
/// closed when its bytes have been moved.
#pragma once

#include <array>
#include <atomic>
#include <cassert>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/failure.h"
#include "engine/file_system.h"
#include "engine/file_table.h"
#include "engine/ground/unique_fd.h"
#include "engine/landing.h"
#include "engine/plan.h"
#include "engine/router.h"
#include "engine/stripe_sums.h"
#include "flashpack/engine.h"

namespace flashpack::internal {

struct TransferState;
struct PrefixCounts;

/// The checksums that a load compares its bytes with: those of the stripes from the first to the last that an extent
/// touches.
struct WantedChecksums {
  std::uint64_t payload_bytes = 0;  // Checksums::size_bytes.
  std::uint64_t first_stripe = 0;   // Index in the file of crc32c[0].
  std::vector<std::uint32_t> crc32c;
};

/// The wishes of a transfer for one file. Constant once the transfer has been started, so that any thread may read it.
struct PartRequest {
  std::filesystem::path path;  // Only for messages if the caller has given a descriptor, or for a store.
  std::uint32_t index = 0;     // Index of the file in the request.
  CachePolicy cache = CachePolicy::kAuto;
  std::optional<FileIdentity> expected;
  std::optional<WantedChecksums> checksums;
  std::vector<Fragment> extents;       // What a load wants. A store is planned from its start on.
  std::uint32_t reported_extents = 0;  // All extents of the file if the completion wants to know of them, else 0.
  bool by_descriptor = false;          // The caller has given a descriptor.
  bool stays_open = false;             // A FileHandle has the file.
};

/// An open file, and the plan of the chunks that are moved from or to it. It stays in its place, because the router
/// borrows the plan.
struct PlannedFile {
  FileUse open;
  Plan plan;
  Router router;
  std::optional<StripeSums> sums;    // Sums of the bytes that are moved; empty if they are not counted.
  std::optional<Landing> landing;    // Empty if nobody wants to know.
  std::string fallback_reason = {};  // Why this is slower, or checks less, than asked for.

  const File& file() const noexcept { return open->file; }
};

/// How the work on a part has ended.
struct PartResult {
  std::optional<Failure> failure;
  std::uint64_t verified_bytes = 0;
  std::uint64_t read_bytes = 0;  // Bytes that open_part() has read: none or all.
  std::string fallback_reason = {};
};

/// The driver and the thread that opens or closes the file of a part share this while the thread works, and nothing
/// else that changes. Thread safety: as each function says.
class Handover {
 public:
  /// Claims the caller's memory for the calling side, the thread or the driver. False if the other side has it. The
  /// thread claims it for as long as it reads into it, and the driver claims it when the part fails. Whichever comes
  /// first decides: the transfer waits until the thread has read, or ends at once and the thread reads nothing.
  bool claim_memory() noexcept { return !memory_claimed_.exchange(true); }
  /// The thread, when it has read.
  void release_memory() noexcept { memory_claimed_ = false; }

  /// Gives the result, once: the thread, when it has nothing left to do but to close the file, or the driver, when no
  /// thread has the part.
  void end(PartResult result) noexcept {
    assert(!ended_);
    result_ = std::move(result);
    ended_ = true;
  }
  /// The driver: null until end().
  const PartResult* result() const noexcept { return ended_ ? &result_ : nullptr; }

 private:
  std::atomic<bool> memory_claimed_ = false;
  std::atomic<bool> ended_ = false;  // Set after result_, which is constant from then on.
  PartResult result_;
};

/// Where a part is on its way, and what OpenParts counts it among. Only OpenParts changes it.
struct PartPlace {
  enum class State : std::uint8_t {
    kWaiting,   // Until its turn comes.
    kOpening,   // A thread opens the file.
    kAnswered,  // That thread has come back; the driver decides at once what is next.
    kOpen,
    kClosing,  // A thread checks and closes the file.
    kDone,
  };

  State state = State::kWaiting;
  // True if no other file was open whose close could free a descriptor; running out is then an error.
  bool alone = false;
  bool late = false;                            // The part's thread has taken longer than kLate.
  std::chrono::steady_clock::time_point since;  // When the part's thread was asked.
  FileSystem* file_system = nullptr;            // Set when the file is open.
  std::array<PrefixCounts*, 2> prefixes{};  // Directory and mount point; set when something is late for the first time.
  bool in_prefixes = false;                 // Whether PrefixCounts::with_threads counts the part.
};

/// Only the driver uses it. Members without a note are changed by Transfers alone. A thread that opens or closes the
/// file gets references to the request and the handover.
struct Part {
  using State = PartPlace::State;

  explicit Part(PartRequest wanted = {}) : request(std::move(wanted)) {}

  const PartRequest request;
  Handover handover;

  PartPlace place;
  std::uint32_t jobs = 0;  // Chunks under way. Only Jobs changes it.

  TransferState* transfer = nullptr;
  std::uint64_t turn = 0;                // Ascends in the order in which transfers start.
  UniqueFd given;                        // The caller's descriptor of the file, until a thread takes it.
  std::unique_ptr<PlannedFile> planned;  // While the file is open and no thread has the part.
  std::uint32_t chunks_open = 0;         // Chunks that have not been delivered yet.
  bool awaited = true;                   // The transfer does not end before the part is done.
  std::optional<Failure> failure;        // Set if the part or its transfer fails before the part has ended.

  State state() const noexcept { return place.state; }
  const Plan& plan() const noexcept { return planned->plan; }
  const File& file() const noexcept { return planned->file(); }
};

/// How the files of a pipeline are opened.
struct OpenRules {
  std::uint32_t chunk_bytes = 0;
  std::uint32_t at_once_bytes = 0;  // See read_at_once().
};

/// Reads a load of at most `at_once_bytes` from the page cache, without waiting for the disk, if all of it is there.
/// This costs less than to hand chunks from thread to thread. Returns nothing if the load must be done by chunks, or if
/// the driver has claimed the memory; the targets may have been changed. Without `known` it may open the file once
/// more, which may block.
std::optional<PartResult> read_at_once(const PartRequest& request, const File& file, const Residency* known,
                                       Handover& handover, std::uint32_t at_once_bytes);

/// Plans the chunks of a load from `planned.open`, and sets the other members of `planned`. Throws: Error, kTruncated.
void plan_load(const PartRequest& request, std::uint32_t chunk_bytes, PlannedFile& planned);

/// The result of open_part(). With `planned` alone, the driver moves the chunks. With both, the file is open but cannot
/// be read, and the driver has it closed. With `failure` alone, the file is not open. With neither, the thread has read
/// all of it and closed it, and the handover has the result.
struct Opened {
  std::unique_ptr<PlannedFile> planned;
  std::optional<Failure> failure;
};

/// Opens the file of a load, from `given` if that is set, checks whether it is the expected one, and plans its chunks.
/// If `may_wait_for_descriptors`, a lack of descriptors is a failure also where the file could be read without direct
/// I/O. May block for ever.
Opened open_part(const PartRequest& request, UniqueFd given, Handover& handover, FileTable& files, OpenRules rules,
                 bool may_wait_for_descriptors = false) noexcept;

/// Checks after a load that the file has not changed and that the bytes match their checksums. May block for ever.
PartResult check_part(const PartRequest& request, const PlannedFile& planned) noexcept;

/// Compares the stripes with bytes between two offsets of the file that have been read whole with their checksums.
/// Returns the number of their bytes. Throws: Error, kCorrupt. Requires: the request has checksums and `planned` has
/// sums; no thread counts bytes of these stripes now.
std::uint64_t compare_stripes(const PartRequest& request, const PlannedFile& planned, std::uint64_t begin_bytes,
                              std::uint64_t end_bytes);

/// Whether the process or the system has no descriptors left.
bool no_descriptors(std::error_code error);

}  // namespace flashpack::internal
