/// Finds the tensors of a module, and the names that they have in files.
///
/// Thread safety: any thread, as long as no other one changes the module.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace torch::nn {
class Module;
}

namespace flashpack {

struct ModuleTensor {
  std::string name;   ///< Path from the root module, with dots.
  at::Tensor tensor;  ///< The module's own tensor, whose data can be changed here.
  bool is_parameter = false;
};

/// Every defined parameter and buffer, a tied one under each of its names, in the order of Python's state_dict().
std::vector<ModuleTensor> module_tensors(const ::torch::nn::Module& module);

}  // namespace flashpack
