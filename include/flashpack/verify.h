/// Checks whether a file still holds the bytes that were written.
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
    std::string tensors;  ///< For messages, the tensors that lie in the stripe: `"a", "b" and 3 more`, or "no tensor"
                          ///< for padding.
  };

  std::uint64_t verified_bytes = 0;  ///< Bytes that match their checksums.
  std::vector<Stripe> corrupt;
  double seconds = 0;
};

/// Reads the payload of the file that `metadata` was read from, and compares every stripe with its checksum; it goes on
/// after a stripe that does not match. The call blocks, and takes 128 MiB of memory in addition to the engine's.
/// `progress`, if given, is called on the calling thread with the number of bytes that are done. Throws: Error
/// (kBadFile when the file has no checksums; kFileChanged; errno). Any thread.
VerifyReport verify_payload(Engine& engine, const std::filesystem::path& path, const Metadata& metadata,
                            const std::function<void(std::uint64_t done_bytes)>& progress = {});

/// The same for a file that is open for reading as `fd`, which is borrowed; `path` is for messages only.
VerifyReport verify_payload(Engine& engine, int fd, const std::filesystem::path& path, const Metadata& metadata,
                            const std::function<void(std::uint64_t done_bytes)>& progress = {});

}  // namespace flashpack
