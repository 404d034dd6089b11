/// Whether a file still holds what was written.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <vector>

#include "flashpack/checksums.h"
#include "flashpack/engine.h"
#include "flashpack/error.h"
#include "flashpack/format.h"

namespace flashpack {

struct VerifyReport {
  /// A stripe of the file that does not match its checksum.
  struct Stripe {
    std::uint64_t offset_bytes = 0;
    std::uint64_t size_bytes = 0;
  };

  std::uint64_t verified_bytes = 0;  ///< That match.
  std::vector<Stripe> corrupt;
  double seconds = 0;
};

/// Reads the payload of the file that `metadata` is of and holds every stripe of it against its checksum, going on
/// after those that do not match. Takes 128 MiB of memory beside the engine's. `progress`, if given, is told on the
/// calling thread how many bytes are done. Throws: Error (kBadFile when the file has no checksums; kFileChanged;
/// errno).
VerifyReport verify_payload(Engine& engine, const std::filesystem::path& path, const Metadata& metadata,
                            const std::function<void(std::uint64_t done_bytes)>& progress = {});

/// The same for a file that is open for reading as `fd`, which is borrowed; `path` is for messages only.
VerifyReport verify_payload(Engine& engine, int fd, const std::filesystem::path& path, const Metadata& metadata,
                            const std::function<void(std::uint64_t done_bytes)>& progress = {});

/// For FileExtents::checksums of a load of `path`, whose footer is `metadata`; whole stripes are the caller's to ask
/// for. Throws: Error (kBadFile) when they are wanted and the file has none.
std::optional<Checksums> checksums_for(const Metadata& metadata, Verify verify, const std::filesystem::path& path);

/// Calls `wait`, which waits for such a load, and returns what it returns. After that, with Verify::kAlways, every byte
/// that was read is one that matches its checksum.
/// Throws: what `wait` throws, where an Error of Errc::kCorrupt also names the tensors in the stripe; Error
/// (kInvalidArgument) when all was to be verified and some stripes were read in part only.
TransferStats verified(const Metadata& metadata, Verify verify, const std::filesystem::path& path,
                       const std::function<TransferStats()>& wait);

}  // namespace flashpack
