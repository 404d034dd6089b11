/// A part of a transfer: all that it moves from or to one file. The file is opened and planned when its turn comes, and
/// closed when its bytes have been moved.
#pragma once

#include <array>
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
#include "engine/handover.h"
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
  std::uint32_t reported_extents = 0;  // How many extents the completion is told of: all of the file, or 0.
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

/// Thread safety: the thread that prepares a transfer makes its parts, and then hands them to the driver, the only one
/// that uses them until the end. Members without a note are changed by Transfers alone. A thread that opens or closes
/// the file gets references to the request and the handover.
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
  bool has_used_page_cache = false;      // Whether bytes have, or may have, gone through the page cache.
  std::optional<Failure> failure;        // Set if the part or its transfer fails before the part has ended.

  State state() const noexcept { return place.state; }
  // These require `planned`.
  const Plan& plan() const noexcept { return planned->plan; }
  const File& file() const noexcept { return planned->file(); }
  OpenFile& open_file() const noexcept { return *planned->open.get(); }
  Router& router() const noexcept { return planned->router; }
  /// Requires: the file is open.
  FileSystem& file_system() const noexcept { return *place.file_system; }
};

/// Checks after a load that the file has not changed and that the bytes match their checksums. May block for ever.
PartResult check_part(const PartRequest& request, const PlannedFile& planned) noexcept;

/// Compares the stripes with bytes between two offsets of the file that have been read whole with their checksums.
/// Returns the number of their bytes. Throws: Error, kCorrupt. Requires: the request has checksums and `planned` has
/// sums; no thread counts bytes of these stripes now.
std::uint64_t compare_stripes(const PartRequest& request, const PlannedFile& planned, std::uint64_t begin_bytes,
                              std::uint64_t end_bytes);

}  // namespace flashpack::internal
