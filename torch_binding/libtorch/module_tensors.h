/// The one place that walks a torch::nn::Module.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace torch::nn {
class Module;
}

namespace flashpack {

struct ModuleTensor {
  std::string name;   ///< With dots, from the module walked.
  at::Tensor tensor;  ///< The module's own: its data can be changed through it.
  bool is_parameter = false;
};

/// Every defined parameter and buffer, a tied one under each of its names, in the order of Python's state_dict().
std::vector<ModuleTensor> module_tensors(const ::torch::nn::Module& module);

}  // namespace flashpack
