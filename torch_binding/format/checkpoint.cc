#include "flashpack/checkpoint.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <set>
#include <string_view>
#include <utility>

#include "engine/ground/error.h"
#include "engine/ground/unique_fd.h"
#include "torch_binding/format/format_rules.h"
#include "torch_binding/format/index.h"

namespace flashpack {

namespace {

namespace fs = std::filesystem;
using internal::errno_code;
using internal::file_error;

constexpr std::string_view kIndexSuffix = ".index.json";
constexpr std::array<std::string_view, 2> kSuffixes = {".flashpack", ".safetensors"};
// The names that this library, transformers and diffusers give to the weights of a model.
constexpr std::array<std::string_view, 3> kUsualNames = {"model.flashpack", "model.safetensors",
                                                         "diffusion_pytorch_model.safetensors"};

CheckpointFile open_one(const fs::path& path) {
  UniqueFd fd = internal::open_file(path);
  Metadata metadata = read_metadata(fd.get(), path);
  return {path, std::move(metadata), std::move(fd)};
}

Checkpoint open_files(const fs::path& path, std::span<const fs::path> paths, const WeightMap& weight_map = {}) {
  std::vector<CheckpointFile> files;
  files.reserve(paths.size());
  for (const fs::path& each : paths) files.push_back(open_one(each));
  return {path, std::move(files), weight_map};
}

Checkpoint open_index(const fs::path& path) {
  const WeightMap map = read_index(path);
  std::set<fs::path> paths;
  for (const auto& [tensor, file] : map) paths.insert(path.parent_path() / file);
  try {
    return open_files(path, std::vector(paths.begin(), paths.end()), map);
  } catch (const Error& error) {
    if (error.code() != std::errc::no_such_file_or_directory) throw;
    throw file_error(error.code(), ("open the files that " + path.string() + " lists:").c_str(), error.path());
  }
}

/// Leaves out safetensors files that have a flashpack file of the same name beside them, as conversions make them.
std::vector<fs::path> without_converted(const std::vector<fs::path>& sorted, std::string_view rest) {
  std::vector<fs::path> left;
  for (const fs::path& path : sorted) {
    std::string name = path.native().substr(0, path.native().size() - rest.size());
    const bool is_safetensors = name.ends_with(kSuffixes.back());
    if (is_safetensors) name.resize(name.size() - kSuffixes.back().size());
    ((name += kSuffixes.front()) += rest);
    if (!is_safetensors || !std::ranges::binary_search(sorted, fs::path(name))) left.push_back(path);
  }
  return left;
}

/// Returns the files in `directory` whose names end with one of kSuffixes and `rest`, sorted.
std::vector<fs::path> files_with(const fs::path& directory, std::string_view rest) {
  std::vector<fs::path> paths;
  try {
    for (const fs::directory_entry& entry : fs::directory_iterator(directory)) {
      const fs::path file = entry.path().filename();
      std::string_view name = file.native();
      if (name.starts_with('.') || !name.ends_with(rest)) continue;
      name.remove_suffix(rest.size());
      if (std::ranges::any_of(kSuffixes, [&](auto suffix) { return name.ends_with(suffix); }))
        paths.push_back(entry.path());
    }
  } catch (const fs::filesystem_error& error) {
    throw file_error(error.code(), "list", directory);
  }
  std::ranges::sort(paths);
  return without_converted(paths, rest);
}

/// Returns the file or the index that stands for a directory.
fs::path chosen_in(const fs::path& directory) {
  for (const std::string_view name : kUsualNames) {
    for (const std::string_view rest : {std::string_view(), kIndexSuffix}) {
      const fs::path path = directory / (std::string(name) += rest);
      std::error_code ignored;
      // This finds a link that leads nowhere, too, because another file in its place would be a surprise.
      if (fs::symlink_status(path, ignored).type() != fs::file_type::not_found) return path;
    }
  }
  for (const std::string_view rest : {kIndexSuffix, std::string_view()}) {
    const std::vector<fs::path> found = files_with(directory, rest);
    if (found.size() == 1) return found.front();
    if (found.empty()) continue;
    std::string listed;
    for (const fs::path& path : std::span(found).first(std::min<std::size_t>(found.size(), 3)))
      listed += (listed.empty() ? "" : ", ") + path.filename().string();
    rules::refuse_to_open(directory, "it has several checkpoints, none of a usual name (" + listed +
                                         (found.size() > 3 ? ", ..." : "") +
                                         "): give the path of one of them, or of its index");
  }
  throw Error(errno_code(EISDIR),
              "open " + directory.string() + ", which has no flashpack or safetensors file and no index of such files",
              directory);
}

}  // namespace

Checkpoint::Checkpoint(std::filesystem::path path, std::vector<CheckpointFile> files, const WeightMap& weight_map)
    : path_(std::move(path)), files_(std::move(files)) {
  std::vector<Shard> shards;
  for (const CheckpointFile& file : files_) {
    std::vector<std::string_view>& names = shards.emplace_back(file.path).names;
    for (const TensorRecord& record : file.metadata.records) names.push_back(record.name);
  }
  for (const auto& [file, record] : places_in(shards, path_, weight_map)) places_.push_back({file, record});
}

std::map<std::string, std::string> Checkpoint::user_metadata() const {
  std::map<std::string, std::string> merged;
  std::set<std::string> disputed;
  for (const CheckpointFile& file : files_) {
    for (const auto& [key, value] : file.metadata.user_metadata) {
      if (merged.try_emplace(key, value).first->second != value) disputed.insert(key);
    }
  }
  for (const std::string& key : disputed) merged.erase(key);
  return merged;
}

Checkpoint open_checkpoint(const std::filesystem::path& path) {
  std::error_code ignored;  // If there is an error, opening the file has it, too.
  if (fs::is_directory(path, ignored)) return open_checkpoint(chosen_in(path));
  if (is_index(path)) return open_index(path);
  return open_files(path, std::span(&path, 1));
}

Checkpoint open_checkpoint(std::span<const std::filesystem::path> files) {
  if (files.empty()) throw internal::argument_error("open a checkpoint: no files are given");
  for (const fs::path& path : files) {
    std::error_code ignored;  // If there is an error, opening the file has it, too.
    const bool is_folder = fs::is_directory(path, ignored);
    if (!is_folder && !is_index(path)) continue;
    const char* what = is_folder ? "a directory" : "an index";
    throw internal::argument_error("open " + path.string() + ", which is " + what +
                                   " in a list of files: give its path alone, or list the files");
  }
  return open_files(files.front(), files);
}

std::optional<Checkpoint> open_checkpoint(const std::filesystem::path& path, std::error_code& error) noexcept {
  return internal::value_or_code<std::optional<Checkpoint>>(error, [&] { return open_checkpoint(path); });
}

std::optional<Checkpoint> open_checkpoint(std::span<const std::filesystem::path> files,
                                          std::error_code& error) noexcept {
  return internal::value_or_code<std::optional<Checkpoint>>(error, [&] { return open_checkpoint(files); });
}

}  // namespace flashpack
