/// What a load that is held against checksums promises, for verify_payload() and the bindings.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "flashpack/checksums.h"
#include "flashpack/engine.h"
#include "flashpack/format.h"

namespace flashpack {

/// The tensors of a file by their place in it, for messages. The metadata is borrowed.
class TensorsByOffset {
 public:
  explicit TensorsByOffset(const Metadata& metadata);

  /// Those that have bytes in that range of the file: `"a", "b" and 3 more`; "no tensor" for padding.
  std::string names_in(std::uint64_t offset_bytes, std::uint64_t size_bytes) const;

 private:
  std::vector<const TensorRecord*> records_;
};

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
