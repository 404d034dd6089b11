/// Opens a checkpoint, which may have several files, as one list of tensors. This needs neither torch nor an engine.
///
///   flashpack::Checkpoint checkpoint = flashpack::open_checkpoint("llama/");
///   for (std::size_t i = 0; i < checkpoint.size(); ++i) std::puts(checkpoint.record(i).name.c_str());
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include "flashpack/error.h"
#include "flashpack/format.h"
#include "flashpack/unique_fd.h"

namespace flashpack {

/// One file of a checkpoint.
struct CheckpointFile {
  std::filesystem::path path;
  Metadata metadata;
  UniqueFd fd;  ///< Open for reading. To be passed as FileExtents::fd.
};

/// Maps the name of each tensor to the name of its file, as an index file does.
using WeightMap = std::map<std::string, std::string, std::less<>>;

/// The tensors of one or several files. Each file stays open, so that payloads are read from the files whose metadata
/// was read, whatever is at their paths by then. Move-only. Thread safety: as a standard container.
class Checkpoint {
 public:
  Checkpoint(Checkpoint&&) = default;
  Checkpoint& operator=(Checkpoint&&) = default;
  /// If several files have a tensor, `weight_map` decides which one is meant. Throws: Error (kBadFile) if it does not,
  /// or if a file lacks a tensor that the map says it has.
  Checkpoint(std::filesystem::path path, std::vector<CheckpointFile> files, const WeightMap& weight_map = {});

  /// The path that was opened, for messages.
  const std::filesystem::path& path() const noexcept { return path_; }
  std::span<const CheckpointFile> files() const noexcept { return files_; }

  /// Number of tensors. They are counted file by file, and in file order in each.
  std::size_t size() const noexcept { return places_.size(); }
  const TensorRecord& record(std::size_t i) const {
    return files_[places_[i].file].metadata.records[places_[i].record];
  }
  /// Index into files() of the file that has the tensor.
  std::size_t file_of(std::size_t i) const { return places_[i].file; }
  /// Index of the tensor among all that its file has.
  std::size_t record_of(std::size_t i) const { return places_[i].record; }

  /// The entries of Metadata::user_metadata in which the files do not contradict each other.
  std::map<std::string, std::string> user_metadata() const;

 private:
  struct Place {
    std::uint32_t file;
    std::uint32_t record;
  };

  std::filesystem::path path_;
  std::vector<CheckpointFile> files_;
  std::vector<Place> places_;
};

/// Opens a flashpack file, a safetensors file, the index of several of either (`*.index.json`, with a "weight_map"), or
/// a directory. Of a directory these are taken, the first that is there: model.flashpack, model.safetensors,
/// diffusion_pytorch_model.safetensors, each alone or by its index; then the only index of such files; then the only
/// such file. When the only one is looked for, a safetensors file or index does not count if a flashpack one of the
/// same name is beside it, because it was converted to that. Several are an error (kBadFile).
///
/// An index decides which file has a tensor; tensors that it does not list are taken, too. Files are beside their
/// index. Takes any bytes for possibly hostile, as read_metadata() does. Throws: Error (kBadFile; kFileChanged;
/// kTruncated; errno), which names the file. Any thread.
Checkpoint open_checkpoint(const std::filesystem::path& path);

/// Opens several files, in that order, as one checkpoint. Throws as above.
Checkpoint open_checkpoint(std::span<const std::filesystem::path> files);

/// The same for programs without exceptions: nothing is returned after an error, whose code is put into `error`; it is
/// empty after success.
std::optional<Checkpoint> open_checkpoint(const std::filesystem::path& path, std::error_code& error) noexcept;
std::optional<Checkpoint> open_checkpoint(std::span<const std::filesystem::path> files,
                                          std::error_code& error) noexcept;

}  // namespace flashpack
