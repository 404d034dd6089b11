/// Keeps the promise of a verified load, for verify_payload() and the bindings.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "flashpack/checkpoint.h"
#include "flashpack/checksums.h"
#include "flashpack/engine.h"
#include "flashpack/format.h"

namespace flashpack {

/// Finds the tensors at a place in a file, for messages. The metadata is borrowed.
class TensorsByOffset {
 public:
  explicit TensorsByOffset(const Metadata& metadata);

  /// The tensors that have bytes in that range of the file: `"a", "b" and 3 more`, or "no tensor" for padding.
  std::string names_in(std::uint64_t offset_bytes, std::uint64_t size_bytes) const;

 private:
  std::vector<const TensorRecord*> records_;
};

/// Returns the FileExtents::checksums for a load of `path`, whose footer is `metadata`; they are a member of
/// `metadata`. The caller has to request whole stripes. Throws: Error (kBadFile) with Verify::kAlways if the file has
/// no checksums.
const Checksums* checksums_for(const Metadata& metadata, Verify verify, const std::filesystem::path& path);

/// Returns the LoadRequest::files of a load that reads `extents[i]` from Checkpoint::files()[i]. Throws: as
/// checksums_for().
std::vector<FileExtents> files_of(const Checkpoint& checkpoint, std::vector<std::vector<Extent>> extents,
                                  Verify verify);

/// Returns the number of bytes that were read. Throws: Error (kInvalidArgument) unless all of them have been verified.
/// `path` is for messages.
std::uint64_t all_verified(const TransferStats& stats, const std::filesystem::path& path);

/// Returns the result of `wait`, which waits for a load of files_of(). With Verify::kAlways, every byte
/// that was read has then matched its checksum. Throws: the exceptions of `wait`, where an Error of Errc::kCorrupt
/// without Error::files() also names the tensors in the stripe; Error (kInvalidArgument) if Verify::kAlways was given
/// and some stripes were read only in part.
TransferStats verified(const Checkpoint& checkpoint, Verify verify, const std::function<TransferStats()>& wait);

}  // namespace flashpack
