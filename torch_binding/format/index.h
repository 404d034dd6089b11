/// The index of a checkpoint of several files.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>
#include <vector>

#include "flashpack/checkpoint.h"

namespace flashpack {

/// Returns `path` without what makes its name that of an index: model.safetensors for model.safetensors.index.json and,
/// with a variant, for model.safetensors.index.fp16.json. Other paths are returned as they are.
std::filesystem::path without_index_suffix(const std::filesystem::path& path);
bool is_index(const std::filesystem::path& path);

/// Whether `name`, which a file gives, can be that of another file beside it, and does not lead out of the directory.
bool is_plain_name(std::string_view name) noexcept;

/// One of the files of a checkpoint, and the names of its tensors, which differ.
struct Shard {
  std::filesystem::path path;
  std::vector<std::string_view> names;
};
/// A tensor: indices of a shard, and of a name in it.
struct PlaceInShards {
  std::uint32_t shard;
  std::uint32_t name;
};

/// Returns the tensors of a checkpoint, shard by shard. `weight_map`, if not empty, says which file has a tensor; those
/// that it does not list are taken, too. `path` is that of the checkpoint, for messages. Throws: Error (kBadFile) if
/// several shards have a tensor that the map does not list, or if a file lacks one that the map says it has.
std::vector<PlaceInShards> places_in(std::span<const Shard> shards, const std::filesystem::path& path,
                                     const WeightMap& weight_map);

/// Parses the text of the index at `path`, which is for messages. The map is not empty, and all files in it are named
/// without a directory, so that they lie beside the index. Throws: Error (kBadFile).
WeightMap parse_index(std::string_view text, const std::filesystem::path& path);

/// Reads such a file and parses it. The files that it names may be of any format, and are not opened. Throws: Error
/// (kBadFile; errno).
WeightMap read_index(const std::filesystem::path& path);

}  // namespace flashpack
