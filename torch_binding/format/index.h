/// The index of a checkpoint of several files.
#pragma once

#include <filesystem>
#include <string_view>

#include "flashpack/checkpoint.h"

namespace flashpack {

/// Returns `path` without what makes its name that of an index: model.safetensors for model.safetensors.index.json and,
/// with a variant, for model.safetensors.index.fp16.json. Other paths are returned as they are.
std::filesystem::path without_index_suffix(const std::filesystem::path& path);
bool is_index(const std::filesystem::path& path);

/// Whether `name`, which a file gives, can be that of another file beside it, and does not lead out of the directory.
bool is_plain_name(std::string_view name) noexcept;

/// Parses the text of the index at `path`, which is for messages. The map is not empty, and all files in it are named
/// without a directory, so that they lie beside the index. Throws: Error (kBadFile).
WeightMap parse_index(std::string_view text, const std::filesystem::path& path);

/// Reads such a file and parses it. The files that it names may be of any format, and are not opened. Throws: Error
/// (kBadFile; errno).
WeightMap read_index(const std::filesystem::path& path);

}  // namespace flashpack
