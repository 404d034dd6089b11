#include "torch_binding/format/index.h"

#include <algorithm>
#include <string>

#include "engine/ground/unique_fd.h"
#include "torch_binding/format/codec.h"
#include "torch_binding/format/foreign_file.h"
#include "torch_binding/format/format_rules.h"
#include "torch_binding/format/json_reader.h"

namespace flashpack {

namespace {

namespace fs = std::filesystem;

// A bound on the memory that a hostile file can ask for, as kMaxFooterBytes, and not tuned.
constexpr std::uint64_t kMaxIndexBytes = std::uint64_t{256} << 20;

}  // namespace

fs::path without_index_suffix(const fs::path& path) {
  // The name up to the last dot: "model.safetensors.index", or with a variant, "model.safetensors.index.fp16".
  fs::path name = path.filename();
  if (name.extension() != ".json") return path;
  name = name.stem();
  if (name.extension() != ".index") name = name.stem();
  return name.extension() == ".index" ? path.parent_path() / name.stem() : path;
}

bool is_index(const fs::path& path) { return without_index_suffix(path) != path; }

bool is_plain_name(std::string_view name) noexcept {
  return !name.empty() && name != "." && name != ".." && name.find_first_of({"/\0", 2}) == name.npos;
}

std::vector<PlaceInShards> places_in(std::span<const Shard> shards, const fs::path& path, const WeightMap& weight_map) {
  std::vector<PlaceInShards> places;
  std::vector<std::string_view> taken;
  for (std::uint32_t s = 0; s < shards.size(); ++s) {
    const std::string file = shards[s].path.filename().string();
    for (std::uint32_t n = 0; n < shards[s].names.size(); ++n) {
      const std::string_view name = shards[s].names[n];
      const auto listed = weight_map.find(name);
      if (listed != weight_map.end() && listed->second != file) continue;
      places.push_back({s, n});
      taken.push_back(name);
    }
  }
  if (shards.size() > 1) {
    if (const auto same = rules::find_duplicate(taken)) {
      const auto file_of = [&](std::size_t i) { return shards[places[i].shard].path.string(); };
      rules::refuse_to_open(path, file_of(same->first) + " and " + file_of(same->second) + " both have " +
                                      rules::quoted(taken[same->first]) +
                                      (weight_map.empty() ? "" : ", and the index does not list it"));
    }
  }
  if (weight_map.empty()) return places;
  std::ranges::sort(taken);
  for (const auto& [name, file] : weight_map) {
    if (!std::ranges::binary_search(taken, name))
      rules::refuse_to_open(path, "it says that " + rules::quoted(name) + " is in " + file + ", but it is not");
  }
  return places;
}

WeightMap read_index(const fs::path& path) {
  const UniqueFd fd = internal::open_file(path);
  const OpenedFile file(fd.get(), path, kMaxIndexBytes);
  file.check_limit("text", file.size_bytes(), kMaxIndexBytes);
  return parse_index(file.read(0, file.size_bytes()), path);
}

WeightMap parse_index(std::string_view text, const fs::path& path) {
  WeightMap map;
  std::string value = "it";  // The value that is read next, as an error names it.
  try {
    JsonReader json(text);
    json.object([&](std::string_view key) {
      if (key != "weight_map") return json.skip();
      value = key;
      json.object([&](std::string_view tensor) {
        value = "the file of " + rules::quoted(tensor);
        std::string& file = map[std::string(tensor)] = json.string();
        if (!is_plain_name(file))
          rules::refuse_to_open(path, "it names " + rules::quoted(file) + ", which is no file beside it");
      });
    });
    json.end();
  } catch (const JsonError& error) {
    const std::string what = text.find_first_of("{[") == 0 ? "" : what_it_is(text);
    rules::refuse_to_open(path, "it is not the index of a sharded checkpoint: " +
                                    (what.empty() ? error.sentence("the text", "an object", value) : what));
  }
  if (map.empty())
    rules::refuse_to_open(path, "it is not the index of a sharded checkpoint: it has no weight_map, or an empty one");
  return map;
}

}  // namespace flashpack
