#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "flashpack/engine.h"
#include "flashpack/format.h"

namespace flashpack::bench {

/// The tensors of a decoder-only model in bf16, sized so that they come to about `total_bytes`: embeddings, then layers
/// of attention, gated MLP and norms, from 32 KiB to hundreds of MiB each.
std::vector<TensorSpec> decoder_tensors(std::uint64_t total_bytes);

/// A name for a generated file: `program`, and what no other process has, not even one in a container, where process
/// ids are the same, or one that was killed and has left its file.
std::string unique_name(const std::string& program);

/// A flashpack file to read. The destructor removes it unless `keep` is true.
class Checkpoint {
 public:
  /// Makes a file of about `size_bytes`, of bytes that do not compress, with checksums. If there is one at `path`,
  /// opens that; but if it is not to be kept, it may be another process's, and is left alone. Throws: Error, in that
  /// case, too.
  Checkpoint(const std::filesystem::path& path, std::uint64_t size_bytes, bool keep);
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;
  ~Checkpoint();

  const std::filesystem::path& path() const { return path_; }
  const Metadata& metadata() const { return metadata_; }

  /// A load with one extent per tensor, to `target` + its file offset. `target` has metadata().payload_bytes bytes.
  LoadRequest request(std::byte* target, CachePolicy cache = CachePolicy::kAuto) const;

  /// Throws: std::runtime_error unless `target` has the bytes of every tensor.
  void check(const std::byte* target) const;

  /// The same of bytes that were loaded from one place in the file.
  void check(std::uint64_t offset_bytes, std::span<const std::byte> loaded) const;

 private:
  std::filesystem::path path_;
  bool keep_;
  Metadata metadata_;
};

}  // namespace flashpack::bench
