#include "torch_binding/libtorch/module_tensors.h"

#include <torch/nn/module.h>

#include "flashpack/torch.h"

namespace flashpack {

namespace {

void append(const ::torch::nn::Module& module, const std::string& prefix, std::vector<ModuleTensor>& out) {
  for (const auto& each : module.named_parameters(/*recurse=*/false))
    out.push_back({prefix + each.key(), each.value(), true});
  for (const auto& each : module.named_buffers(/*recurse=*/false))
    out.push_back({prefix + each.key(), each.value(), false});
  for (const auto& child : module.named_children()) {
    if (child.value()) append(*child.value(), prefix + child.key() + ".", out);
  }
}

}  // namespace

std::vector<ModuleTensor> module_tensors(const ::torch::nn::Module& module) {
  std::vector<ModuleTensor> tensors;
  append(module, "", tensors);
  return tensors;
}

StateDict state_dict(const ::torch::nn::Module& module) {
  StateDict tensors;
  for (auto& each : module_tensors(module)) tensors.emplace_back(std::move(each.name), std::move(each.tensor));
  return tensors;
}

}  // namespace flashpack
