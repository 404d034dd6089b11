#include "bench/support/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>

#include "bench/support/open_file.h"

namespace flashpack::bench {

namespace {

constexpr std::size_t kPieceBytes = std::size_t{64} << 20;

void add_layer(std::vector<TensorSpec>& tensors, int layer, std::int64_t width) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".";
  const auto add = [&](const char* name, std::vector<std::int64_t> shape) {
    tensors.push_back({prefix + name + ".weight", DType::kBFloat16, std::move(shape)});
  };
  add("self_attn.q_proj", {width, width});
  add("self_attn.k_proj", {width / 4, width});
  add("self_attn.v_proj", {width / 4, width});
  add("self_attn.o_proj", {width, width});
  add("mlp.gate_proj", {3 * width, width});
  add("mlp.up_proj", {3 * width, width});
  add("mlp.down_proj", {width, 3 * width});
  add("input_layernorm", {width});
  add("post_attention_layernorm", {width});
}

/// Fills with SplitMix64 of the position, so that every byte is known from its offset, and nothing compresses or
/// repeats.
void fill_incompressible(std::span<std::uint64_t> words, std::uint64_t first_index) {
  for (std::size_t i = 0; i < words.size(); ++i) {
    std::uint64_t z = (first_index + i + 1) * 0x9E3779B97F4A7C15U;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    words[i] = z ^ (z >> 31);
  }
}

void make_checkpoint(const std::filesystem::path& path, std::uint64_t size_bytes) {
  const auto tensors = decoder_tensors(size_bytes);
  Metadata metadata = make_layout(tensors, 128);
  Engine engine;
  FileWriter writer = engine.create(path, {.payload_bytes = metadata.payload_bytes, .checksums = true});
  std::vector<std::uint64_t> words(kPieceBytes / sizeof(std::uint64_t));
  for (std::uint64_t offset = 0; offset < metadata.payload_bytes; offset += kPieceBytes) {
    fill_incompressible(words, offset / sizeof(std::uint64_t));
    const std::uint64_t size = std::min<std::uint64_t>(kPieceBytes, metadata.payload_bytes - offset);
    writer.write({.extents = {{.offset_bytes = offset, .size_bytes = size, .source = words.data()}}});
  }
  metadata.checksums = writer.checksums();
  const std::string footer = encode_footer(metadata);
  writer.commit(std::as_bytes(std::span(footer)));
}

Metadata open_or_make(const std::filesystem::path& path, std::uint64_t size_bytes, bool keep) {
  const bool exists = std::filesystem::exists(path);
  if (exists && !keep) throw Error(std::make_error_code(std::errc::file_exists), "make " + path.string(), path);
  if (!exists) make_checkpoint(path, size_bytes);
  return read_metadata(path);
}

}  // namespace

std::vector<TensorSpec> decoder_tensors(std::uint64_t total_bytes) {
  constexpr int kLayers = 32;
  constexpr std::int64_t kVocabulary = 32000;
  // A layer has 11.5 width^2 elements and the embedding kVocabulary * width, of two bytes each.
  const double a = 11.5 * kLayers;
  const double half = kVocabulary / 2.0;
  const double width = (std::sqrt(half * half + a * static_cast<double>(total_bytes) / 2) - half) / a;
  const auto rounded = std::max<std::int64_t>(64, std::llround(width / 64) * 64);
  std::vector<TensorSpec> tensors{{"model.embed_tokens.weight", DType::kBFloat16, {kVocabulary, rounded}}};
  for (int layer = 0; layer < kLayers; ++layer) add_layer(tensors, layer, rounded);
  tensors.push_back({"model.norm.weight", DType::kBFloat16, {rounded}});
  return tensors;
}

std::string unique_name(const std::string& program) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return program + "." + std::to_string(::getpid()) + "." + std::to_string(now.count()) + ".flashpack";
}

Checkpoint::Checkpoint(const std::filesystem::path& path, std::uint64_t size_bytes, bool keep)
    : path_(path), keep_(keep), metadata_(open_or_make(path, size_bytes, keep)) {}

Checkpoint::~Checkpoint() {
  std::error_code ignored;
  if (!keep_) std::filesystem::remove(path_, ignored);
}

LoadRequest Checkpoint::request(std::byte* target, CachePolicy cache) const {
  FileExtents file{.path = path_, .extents = {}, .expected = metadata_.identity};
  for (const TensorRecord& record : metadata_.records) {
    file.extents.push_back({record.offset_bytes, record.size_bytes, target + record.offset_bytes});
  }
  return {.files = {std::move(file)}, .cache = cache, .deadline = std::nullopt};
}

void Checkpoint::check(const std::byte* target) const {
  for (const TensorRecord& record : metadata_.records)
    check(record.offset_bytes, {target + record.offset_bytes, record.size_bytes});
}

void Checkpoint::check(std::uint64_t offset_bytes, std::span<const std::byte> loaded) const {
  const OpenFile file(path_, O_RDONLY);
  std::vector<std::byte> expected(loaded.size());
  const ssize_t result = ::pread(file.fd(), expected.data(), expected.size(), static_cast<off_t>(offset_bytes));
  if (result != static_cast<ssize_t>(expected.size())) throw file.error("read", result < 0 ? errno : EIO);
  if (std::memcmp(expected.data(), loaded.data(), expected.size()) != 0)
    throw std::runtime_error("wrong bytes at " + std::to_string(offset_bytes) + " of " + path_.string());
}

}  // namespace flashpack::bench
