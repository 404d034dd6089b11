#include "torch_binding/libtorch/module_tensors.h"

#include "tests/libtorch/modules.h"
#include "tests/libtorch/torch_fixture.h"

namespace flashpack {
namespace {

using test::names_of;

TEST(ModuleTensors, ListsOwnParametersThenOwnBuffersThenChildren) {
  const std::vector<std::string> expected = {"scale",
                                             "steps",
                                             "block.linear.weight",
                                             "block.linear.bias",
                                             "block.norm.weight",
                                             "block.norm.bias",
                                             "block.norm.running_mean",
                                             "block.norm.running_var",
                                             "block.norm.num_batches_tracked",
                                             "head.weight"};
  EXPECT_EQ(names_of(state_dict(test::NetImpl())), expected);
}

TEST(ModuleTensors, KnowsParametersFromBuffers) {
  for (const auto& each : module_tensors(test::NetImpl())) {
    const bool is_buffer = each.name == "steps" || each.name.find("running") != std::string::npos ||
                           each.name.ends_with("num_batches_tracked");
    EXPECT_EQ(each.is_parameter, !is_buffer) << each.name;
  }
}

TEST(ModuleTensors, ListsATiedTensorUnderEachOfItsNames) {
  const auto tensors = module_tensors(test::TiedImpl());
  ASSERT_EQ(tensors.size(), 2U);
  EXPECT_EQ(tensors[0].name, "embedding.weight");
  EXPECT_EQ(tensors[1].name, "decoder.weight");
  EXPECT_TRUE(tensors[0].tensor.is_same(tensors[1].tensor));
}

TEST(ModuleTensors, LeavesOutWhatIsRegisteredButUndefined) {
  ::torch::nn::BatchNorm1d norm(::torch::nn::BatchNorm1dOptions(3).affine(false).track_running_stats(false));
  norm->register_buffer("later", at::Tensor());
  EXPECT_TRUE(module_tensors(*norm).empty());
}

}  // namespace
}  // namespace flashpack
