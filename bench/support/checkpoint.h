#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <vector>

#include "flashpack/engine.h"
#include "flashpack/format.h"

namespace flashpack::bench {

/// The tensors of a decoder-only model in bf16, sized so that they come to about `total_bytes`: embeddings, then layers
/// of attention, gated MLP and norms, from 32 KiB to hundreds of MiB each.
std::vector<TensorSpec> decoder_tensors(std::uint64_t total_bytes);

/// A flashpack file to read. Removed by the destructor when it was made for this run alone.
class Checkpoint {
 public:
  /// Opens `path`; a file that is not there is made, of about `size_bytes`, with bytes that do not compress and
  /// their checksums.
  /// Throws: Error.
  Checkpoint(const std::filesystem::path& path, std::uint64_t size_bytes, bool keep);
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;
  ~Checkpoint();

  const std::filesystem::path& path() const { return path_; }
  const Metadata& metadata() const { return metadata_; }

  /// One extent per tensor, at its file offset from `target`, which holds metadata().payload_bytes.
  LoadRequest request(std::byte* target, CachePolicy cache = CachePolicy::kAuto) const;

  /// Throws: std::runtime_error when `target` is not what the file says, tensor by tensor.
  void check(const std::byte* target) const;

 private:
  std::filesystem::path path_;
  bool keep_;
  Metadata metadata_;
};

}  // namespace flashpack::bench
