// Reads the tensors of all-MiniLM-L6-v2 from a flashpack file, from the disk and from the page cache, then gives a
// LibTorch module its weights and runs it.
#include <ATen/ops/arange.h>
#include <c10/core/InferenceMode.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/normalization.h>

#include <cstdio>

#include "flashpack/mixin.h"

namespace {

// The first part of the model, with the names that its weights have in the file.
struct EmbeddingsImpl : torch::nn::Module {
  EmbeddingsImpl() {
    register_buffer("position_ids", at::arange(512).unsqueeze(0));
    words = register_module("word_embeddings", torch::nn::Embedding(30522, 384));
    positions = register_module("position_embeddings", torch::nn::Embedding(512, 384));
    types = register_module("token_type_embeddings", torch::nn::Embedding(2, 384));
    norm = register_module("LayerNorm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({384}).eps(1e-12)));
  }
  at::Tensor forward(const at::Tensor& ids) {
    const at::Tensor position = at::arange(ids.size(1)).unsqueeze(0);
    return norm(words(ids) + positions(position) + types(position * 0));
  }
  torch::nn::Embedding words{nullptr}, positions{nullptr}, types{nullptr};
  torch::nn::LayerNorm norm{nullptr};
};

struct MiniLmImpl : torch::nn::Module, flashpack::FlashPackMixin<MiniLmImpl> {
  MiniLmImpl() : embeddings(register_module("embeddings", std::make_shared<EmbeddingsImpl>())) {}
  std::shared_ptr<EmbeddingsImpl> embeddings;
};

void report(const char* what, const flashpack::LoadedTensors& loaded) {
  const flashpack::TransferStats& stats = loaded.stats;
  const bool ring = stats.backend == flashpack::Backend::kIoUring;
  const double megabytes = static_cast<double>(stats.requested_bytes) / 1e6;
  const double direct = static_cast<double>(stats.direct_bytes);
  std::printf("  %-15s %zu tensors, %.1f MB in %.1f ms, %.2f GB/s; %.0f %% past the page cache (%s)\n", what,
              loaded.tensors.size(), megabytes, stats.seconds * 1e3, megabytes / 1e3 / stats.seconds,
              100 * direct / (direct + static_cast<double>(stats.buffered_bytes)),
              ring ? "io_uring" : "worker threads");
  if (!stats.fallback_reason.empty()) std::printf("  %-15s %s\n", "", stats.fallback_reason.c_str());
}

void run(const char* path) {
  flashpack::Engine engine;
  std::printf("C++ and LibTorch: %s\n", path);
  report("from the disk", read_tensors(engine, path, {.cache = flashpack::CachePolicy::kDirect}));
  read_tensors(engine, path, {.cache = flashpack::CachePolicy::kBuffered});
  report("from the cache", read_tensors(engine, path));

  const c10::InferenceMode inference;
  const auto model = MiniLmImpl::from_flashpack(
      engine, path, {.strict_buffers = true, .ignore = {.prefixes = {"encoder.", "pooler."}}});
  const at::Tensor hidden = model->embeddings->forward(at::arange(2000, 2008).unsqueeze(0));
  std::printf("  %-15s assigned; of 8 tokens: [%lld, %lld, %lld], norm of the first %.3f\n", "embeddings",
              static_cast<long long>(hidden.size(0)), static_cast<long long>(hidden.size(1)),
              static_cast<long long>(hidden.size(2)), hidden[0][0].norm().item<double>());
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::fprintf(stderr, "usage: quickstart_cpp FILE\n");
    return 2;
  }
  run(argv[1]);
} catch (const std::exception& error) {
  std::fprintf(stderr, "quickstart_cpp: %s\n", error.what());
  return 1;
}
