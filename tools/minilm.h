// all-MiniLM-L6-v2 as a LibTorch module: all of its weights, under the names that they have in the file.
#pragma once

#include <ATen/ops/zeros.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "flashpack/mixin.h"

namespace quickstart {

namespace nn = torch::nn;
using Parts = std::vector<std::pair<std::string, std::shared_ptr<nn::Module>>>;

inline constexpr int kWidth = 384;
inline constexpr int kInnerWidth = 1536;
inline constexpr int kLayers = 6;

inline std::shared_ptr<nn::Module> group(const Parts& parts) {
  auto module = std::make_shared<nn::Module>();
  for (const auto& [name, part] : parts) module->register_module(name, part);
  return module;
}

inline std::shared_ptr<nn::Module> linear(int in, int out) { return std::make_shared<nn::LinearImpl>(in, out); }
inline nn::LayerNorm layer_norm() { return nn::LayerNorm(nn::LayerNormOptions({kWidth}).eps(1e-12)); }
inline std::shared_ptr<nn::Module> normed(int in) {
  return group({{"dense", linear(in, kWidth)}, {"LayerNorm", layer_norm().ptr()}});
}

inline std::shared_ptr<nn::Module> encoder_layer() {
  const auto projections =
      group({{"query", linear(kWidth, kWidth)}, {"key", linear(kWidth, kWidth)}, {"value", linear(kWidth, kWidth)}});
  return group({{"attention", group({{"self", projections}, {"output", normed(kWidth)}})},
                {"intermediate", group({{"dense", linear(kWidth, kInnerWidth)}})},
                {"output", normed(kInnerWidth)}});
}

struct EmbeddingsImpl : nn::Module {
  EmbeddingsImpl() : position_ids(register_buffer("position_ids", at::zeros({1, 512}, at::kLong))) {
    words = register_module("word_embeddings", nn::Embedding(30522, kWidth));
    positions = register_module("position_embeddings", nn::Embedding(512, kWidth));
    types = register_module("token_type_embeddings", nn::Embedding(2, kWidth));
    norm = register_module("LayerNorm", layer_norm());
  }
  at::Tensor forward(const at::Tensor& ids) {
    const at::Tensor position = position_ids.narrow(1, 0, ids.size(1));
    return norm(words(ids) + positions(position) + types(position * 0));
  }
  at::Tensor position_ids;
  nn::Embedding words{nullptr}, positions{nullptr}, types{nullptr};
  nn::LayerNorm norm{nullptr};
};

struct MiniLmImpl : nn::Module, flashpack::FlashPackMixin<MiniLmImpl> {
  MiniLmImpl() : embeddings(register_module("embeddings", std::make_shared<EmbeddingsImpl>())) {
    Parts layers;
    for (int i = 0; i < kLayers; ++i) layers.emplace_back(std::to_string(i), encoder_layer());
    register_module("encoder", group({{"layer", group(layers)}}));
    register_module("pooler", group({{"dense", linear(kWidth, kWidth)}}));
  }
  std::shared_ptr<EmbeddingsImpl> embeddings;
};

}  // namespace quickstart
