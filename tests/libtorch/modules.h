/// Modules that the tests pack and assign.
#pragma once

#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <memory>

#include "flashpack/mixin.h"

namespace flashpack::test {

struct BlockImpl : ::torch::nn::Module {
  explicit BlockImpl(int width) {
    linear = register_module("linear", ::torch::nn::Linear(width, width));
    norm = register_module("norm", ::torch::nn::BatchNorm1d(width));
  }
  ::torch::nn::Linear linear{nullptr};
  ::torch::nn::BatchNorm1d norm{nullptr};
};

// Parameters and buffers of its own, nested children, a zero-dim buffer (num_batches_tracked).
struct NetImpl : ::torch::nn::Module, FlashPackMixin<NetImpl> {
  explicit NetImpl(int width = 4) {
    block = register_module("block", std::make_shared<BlockImpl>(width));
    head = register_module("head", ::torch::nn::Linear(::torch::nn::LinearOptions(width, 2).bias(false)));
    scale = register_parameter("scale", at::randn({}));
    steps = register_buffer("steps", at::arange(3));
  }
  std::shared_ptr<BlockImpl> block;
  ::torch::nn::Linear head{nullptr};
  at::Tensor scale;
  at::Tensor steps;
};

struct DecoderImpl : ::torch::nn::Module {
  explicit DecoderImpl(const at::Tensor& shared) : weight(register_parameter("weight", shared)) {}
  at::Tensor weight;
};

// decoder.weight is embedding.weight.
struct TiedImpl : ::torch::nn::Module {
  TiedImpl() {
    embedding = register_module("embedding", ::torch::nn::Embedding(5, 3));
    decoder = register_module("decoder", std::make_shared<DecoderImpl>(embedding->weight));
  }
  ::torch::nn::Embedding embedding{nullptr};
  std::shared_ptr<DecoderImpl> decoder;
};

}  // namespace flashpack::test
