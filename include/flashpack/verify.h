/// Whether a file still holds what was written.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "flashpack/engine.h"
#include "flashpack/error.h"
#include "flashpack/format.h"

namespace flashpack {

struct VerifyReport {
  /// A stripe of the file that does not match its checksum.
  struct Stripe {
    std::uint64_t offset_bytes = 0;
    std::uint64_t size_bytes = 0;
    std::string tensors;  ///< For messages: those that lie in it, as in `"a", "b" and 3 more`; "no tensor" for padding.
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

}  // namespace flashpack
