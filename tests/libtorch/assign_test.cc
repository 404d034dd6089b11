#include <c10/core/InferenceMode.h>

#include "flashpack/format.h"
#include "tests/libtorch/modules.h"
#include "tests/libtorch/torch_fixture.h"

namespace flashpack {
namespace {

using test::DecoderImpl;
using test::error_of;
using test::names_of;
using test::NetImpl;
using test::same_bytes;
using test::TiedImpl;
using test::TorchTest;

// What must not change when an assignment fails.
struct Snapshot {
  struct Entry {
    std::string name;
    const void* impl;
    const void* data;
    at::Tensor values;
    bool requires_grad;
  };
  std::vector<Entry> entries;

  explicit Snapshot(const ::torch::nn::Module& module) {
    for (const auto& [name, tensor] : state_dict(module)) {
      entries.push_back({name, tensor.unsafeGetTensorImpl(), tensor.is_meta() ? nullptr : tensor.const_data_ptr(),
                         tensor.detach().clone(), tensor.requires_grad()});
    }
  }

  void expect_unchanged(const ::torch::nn::Module& module) const {
    const Snapshot now(module);
    ASSERT_EQ(now.entries.size(), entries.size());
    for (std::size_t i = 0; i < entries.size(); ++i) {
      EXPECT_EQ(now.entries[i].impl, entries[i].impl) << entries[i].name;
      EXPECT_EQ(now.entries[i].data, entries[i].data) << entries[i].name;
      EXPECT_EQ(now.entries[i].requires_grad, entries[i].requires_grad) << entries[i].name;
      if (entries[i].data == nullptr) continue;
      EXPECT_TRUE(same_bytes(now.entries[i].values, entries[i].values)) << entries[i].name;
    }
  }
};

class Assign : public TorchTest {
 protected:
  // The error of assigning file() to `module`, which must come out untouched.
  Error refusal(::torch::nn::Module& module, const AssignOptions& options = {}) {
    const Snapshot before(module);
    const Error error = error_of([&] { assign_from_file(engine_, module, file(), options); });
    before.expect_unchanged(module);
    EXPECT_EQ(error.path(), file());
    EXPECT_MENTIONS(error, file().string());
    return error;
  }

  // state_dict(module) with `name` replaced, or left out when `tensor` is undefined.
  static StateDict changed(const ::torch::nn::Module& module, const std::string& name, const at::Tensor& tensor) {
    StateDict tensors;
    for (auto& each : state_dict(module)) {
      if (each.first != name) tensors.push_back(each);
    }
    if (tensor.defined()) tensors.emplace_back(name, tensor);
    return tensors;
  }
};

TEST_F(Assign, EveryTensorOfTheModuleGetsTheFilesBytesAndStaysTheSameObject) {
  const NetImpl saved;
  pack_to_file(engine_, saved, file());
  NetImpl net;
  net.head->weight.set_requires_grad(false);
  const Snapshot before(net);
  const AssignReport report = assign_from_file(engine_, net, file());
  EXPECT_EQ(report.assigned, names_of(state_dict(net)));
  EXPECT_EQ(report.stats.requested_bytes, read_metadata(file()).payload_bytes);
  const StateDict expected = state_dict(saved);
  const StateDict actual = state_dict(net);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(same_bytes(actual[i].second, expected[i].second)) << actual[i].first;
    EXPECT_EQ(actual[i].second.unsafeGetTensorImpl(), before.entries[i].impl) << actual[i].first;
    EXPECT_EQ(actual[i].second.requires_grad(), before.entries[i].requires_grad) << actual[i].first;
  }
  EXPECT_TRUE(same_bytes(net.scale, saved.scale)) << "the member is another tensor than the registered one";
}

TEST_F(Assign, BackwardWorksWhenTheForwardPassUpdatesABufferInPlace) {
  pack_to_file(engine_, NetImpl(), file());
  NetImpl net;
  assign_from_file(engine_, net, file());
  at::Tensor y = net.block->norm(net.block->linear(at::randn({8, 4})));
  net.steps.add_(1);
  net.head(y).mul(net.scale).sum().backward();
  EXPECT_TRUE(net.block->linear->weight.grad().defined());
  EXPECT_TRUE(net.scale.grad().defined());
}

TEST_F(Assign, ParametersTakeTheFilesDTypeAndCoerceDTypeKeepsTheModules) {
  const NetImpl saved;
  const at::Tensor half = saved.head->weight.detach().to(at::kHalf);
  pack(changed(saved, "head.weight", half));
  NetImpl net;
  assign_from_file(engine_, net, file());
  EXPECT_TRUE(same_bytes(net.head->weight, half));
  NetImpl coerced;
  assign_from_file(engine_, coerced, file(), {.coerce_dtype = true});
  EXPECT_TRUE(same_bytes(coerced.head->weight, half.to(at::kFloat)));
}

TEST_F(Assign, AGradientIsDroppedOnlyWhenItNoLongerFitsItsParameter) {
  NetImpl net;
  pack(changed(net, "head.weight", net.head->weight.detach().to(at::kDouble)));
  net.head(at::ones({4})).mul(net.scale).sum().backward();
  const at::Tensor scale_grad = net.scale.grad();
  assign_from_file(engine_, net, file(), {.coerce_dtype = true});
  EXPECT_TRUE(net.head->weight.grad().defined());
  pack(changed(net, "head.weight", at::ones({3})));
  refusal(net);
  EXPECT_TRUE(net.head->weight.grad().defined());

  pack(changed(net, "head.weight", net.head->weight.detach().to(at::kDouble)));
  assign_from_file(engine_, net, file());
  EXPECT_FALSE(net.head->weight.grad().defined());
  EXPECT_TRUE(net.scale.grad().is_same(scale_grad));
  net.head(at::ones({4}, at::kDouble)).mul(net.scale).sum().backward();
  EXPECT_EQ(net.head->weight.grad().scalar_type(), at::kDouble);
}

TEST_F(Assign, AGradientOfAnotherShapeIsDropped) {
  NetImpl net;
  pack_to_file(engine_, net, file());
  net.scale.mutable_grad() = at::ones({2});
  assign_from_file(engine_, net, file());
  EXPECT_FALSE(net.scale.grad().defined());
}

TEST_F(Assign, ABufferOfAnotherDTypeIsAnErrorUnlessCoerced) {
  NetImpl net;
  pack(changed(net, "steps", at::ones({3}, at::kInt)));
  const Error error = refusal(net);
  EXPECT_EQ(error.code(), Errc::kMismatch);
  EXPECT_MENTIONS(error, "dtype mismatch for buffer 'steps': model=int64 vs flash=int32");
  assign_from_file(engine_, net, file(), {.coerce_dtype = true});
  EXPECT_TRUE(same_bytes(net.steps, at::ones({3}, at::kLong)));
}

TEST_F(Assign, CoercingIntegersFailsWhereAValueWouldChangeAndLeavesTheModule) {
  NetImpl net;
  pack(changed(net, "steps", at::full({3}, 1.5)));
  const Snapshot before(net);
  const Error error = error_of([&] { assign_from_file(engine_, net, file(), {.coerce_dtype = true}); });
  EXPECT_EQ(error.code(), Errc::kMismatch);
  EXPECT_MENTIONS(error, "buffer 'steps' would lose values if it were cast from float32 to int64");
  before.expect_unchanged(net);
}

TEST_F(Assign, AParameterThatRequiresGradCannotBecomeInteger) {
  NetImpl net;
  pack(changed(net, "scale", at::scalar_tensor(3, at::kLong)));
  EXPECT_MENTIONS(refusal(net), "parameter 'scale' requires grad");
  net.scale.set_requires_grad(false);
  assign_from_file(engine_, net, file());
  EXPECT_EQ(net.scale.item<std::int64_t>(), 3);
}

TEST_F(Assign, AShapeThatDiffersIsAnErrorWithBothShapes) {
  NetImpl net;
  pack(changed(net, "head.weight", at::ones({8})));
  EXPECT_EQ(refusal(net).code(), Errc::kMismatch);
  EXPECT_MENTIONS(refusal(net), "shape mismatch for parameter 'head.weight': model=[2, 4] vs flash=[8]");
  pack(changed(net, "block.norm.num_batches_tracked", at::ones({1}, at::kLong)));
  EXPECT_MENTIONS(refusal(net), "buffer 'block.norm.num_batches_tracked': model=[] vs flash=[1]");
}

TEST_F(Assign, AMissingParameterIsAnErrorUnlessNotStrictOrIgnored) {
  NetImpl net;
  pack(changed(net, "head.weight", {}));
  EXPECT_MENTIONS(refusal(net), "Missing 1 parameters: ['head.weight']");
  const Snapshot before(net);
  const auto report = assign_from_file(engine_, net, file(), {.strict_params = false});
  EXPECT_EQ(report.missing_parameters, std::vector<std::string>{"head.weight"});
  EXPECT_EQ(net.head->weight.const_data_ptr(), before.entries.back().data);
  const auto ignoring = assign_from_file(engine_, net, file(), {.ignore = {.prefixes = {"head."}}});
  EXPECT_TRUE(ignoring.missing_parameters.empty());
}

TEST_F(Assign, AMissingBufferIsReportedAndAnErrorWhenStrict) {
  NetImpl net;
  pack(changed(net, "steps", {}));
  EXPECT_MENTIONS(refusal(net, {.strict_buffers = true}), "Missing 1 buffers: ['steps']");
  EXPECT_EQ(assign_from_file(engine_, net, file()).missing_buffers, std::vector<std::string>{"steps"});
  pack({{"scale", net.scale}});
  EXPECT_MENTIONS(refusal(net, {.strict_buffers = true}), "Missing 5 parameters and 4 buffers: ['block.linear.weight'");
}

TEST_F(Assign, AnUnexpectedNameIsAnErrorUnlessNotStrictOrIgnored) {
  NetImpl net;
  pack(changed(net, "extra", at::ones({7})));
  EXPECT_EQ(refusal(net).code(), Errc::kMismatch);
  EXPECT_MENTIONS(refusal(net), "Could not assign 1 names: ['extra']");
  EXPECT_MENTIONS(refusal(net, {.strict_params = false, .strict_buffers = true}), "Could not assign 1 names");
  const auto report = assign_from_file(engine_, net, file(), {.strict_params = false});
  EXPECT_EQ(report.unexpected, std::vector<std::string>{"extra"});
  const auto ignoring = assign_from_file(engine_, net, file(), {.ignore = {.names = {"extra"}}});
  EXPECT_TRUE(ignoring.unexpected.empty());
}

TEST_F(Assign, LongListsOfNamesAreCutInTheMessage) {
  NetImpl net;
  StateDict tensors;
  for (int i = 0; i < 25; ++i) tensors.emplace_back("extra" + std::to_string(i), at::ones({1}));
  pack(tensors);
  EXPECT_MENTIONS(refusal(net), "Could not assign 25 names: ['extra0', 'extra1'");
  EXPECT_MENTIONS(refusal(net), "and 5 more]");
}

TEST_F(Assign, IgnoredTensorsKeepTheirValues) {
  const NetImpl saved;
  pack_to_file(engine_, saved, file());
  NetImpl net;
  const at::Tensor head = net.head->weight.detach().clone();
  assign_from_file(engine_, net, file(), {.ignore = {.names = {"head.weight"}}});
  EXPECT_TRUE(same_bytes(net.head->weight, head));
  EXPECT_TRUE(same_bytes(net.scale, saved.scale));
}

TEST_F(Assign, TiedParametersAreLoadedOnceAndStayTied) {
  const at::Tensor weight = at::randn({5, 3});
  const std::vector<StateDict> files = {{{"embedding.weight", weight}, {"decoder.weight", weight}},
                                        {{"embedding.weight", weight}},
                                        {{"decoder.weight", weight}}};
  for (const StateDict& tensors : files) {
    pack(tensors, {.align_bytes = 0});
    TiedImpl tied;
    const AssignReport report = assign_from_file(engine_, tied, file());
    EXPECT_EQ(report.assigned, std::vector<std::string>{"embedding.weight"});
    EXPECT_EQ(report.stats.requested_bytes, weight.nbytes());
    EXPECT_TRUE(same_bytes(tied.decoder->weight, weight));
    EXPECT_TRUE(tied.decoder->weight.is_same(tied.embedding->weight));
    EXPECT_EQ(tied.decoder->weight.const_data_ptr(), tied.embedding->weight.const_data_ptr());
  }
}

TEST_F(Assign, ATiedParameterTakesTheFirstOfItsNamesThatTheFileHas) {
  const at::Tensor weight = at::randn({5, 3});
  pack({{"decoder.weight", at::zeros({5, 3})}, {"embedding.weight", weight}});
  TiedImpl tied;
  assign_from_file(engine_, tied, file());
  EXPECT_TRUE(same_bytes(tied.decoder->weight, weight));
}

TEST_F(Assign, ATiedParameterIsWrittenUnderEachOfItsNames) {
  pack_to_file(engine_, TiedImpl(), file());
  EXPECT_EQ(read_tensors(engine_, file()).tensors.size(), 2U);
}

TEST_F(Assign, AModuleThatIsNotInCpuMemoryIsRefused) {
  pack({{"weight", at::ones({3})}});
  DecoderImpl net(at::empty({3}, at::TensorOptions(at::kMeta)));
  const Error error = refusal(net);
  EXPECT_EQ(error.code(), Errc::kInvalidArgument);
  EXPECT_MENTIONS(error, "parameter 'weight'");
  EXPECT_MENTIONS(error, "only dense tensors on the CPU or");
}

TEST_F(Assign, AModuleKeepsToTheModeItWasMadeIn) {
  const NetImpl saved;
  pack_to_file(engine_, saved, file());
  {
    const auto net = [] {
      const c10::InferenceMode mode;
      return std::make_shared<NetImpl>();
    }();
    assign_from_file(engine_, *net, file());
    EXPECT_TRUE(net->scale.is_inference());
    EXPECT_TRUE(same_bytes(net->scale, saved.scale));
  }
  NetImpl net;
  {
    const c10::InferenceMode mode;
    assign_from_file(engine_, net, file());
  }
  EXPECT_FALSE(net.scale.is_inference());
  net.scale.mul(2).backward();
}

TEST_F(Assign, AFileThatCannotBeReadLeavesTheModuleAsItWas) {
  NetImpl net;
  EXPECT_EQ(refusal(net).code(), std::errc::no_such_file_or_directory);
  std::filesystem::create_directory(file());
  refusal(net);
  std::filesystem::remove(file());

  pack_to_file(engine_, net, file());
  std::filesystem::resize_file(file(), std::filesystem::file_size(file()) - 100);
  EXPECT_EQ(refusal(net).code(), Errc::kBadFile);
}

TEST_F(Assign, MemoryThatRunsOutAfterTheChecksLeavesTheModuleAsItWas) {
  ::torch::nn::Linear net(::torch::nn::LinearOptions(4096, 8192).bias(false));
  pack_to_file(engine_, *net, file());
  const Snapshot before(*net);
  std::error_code code;
  try {
    const test::AddressSpaceLimit limit(std::uint64_t{32} << 20);
    assign_from_file(engine_, *net, file());
  } catch (const Error& error) {
    code = error.code();
  }
  EXPECT_EQ(code, std::errc::not_enough_memory);
  before.expect_unchanged(*net);
}

class Mixin : public TorchTest {};

TEST_F(Mixin, AModuleSavesItselfAndComesBackInEvaluationMode) {
  const NetImpl saved(6);
  saved.save_flashpack(engine_, file());
  const std::shared_ptr<NetImpl> net = NetImpl::from_flashpack(engine_, file(), {}, 6);
  EXPECT_FALSE(net->is_training());
  EXPECT_FALSE(net->block->norm->is_training());
  const StateDict expected = state_dict(saved);
  const StateDict actual = state_dict(*net);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(same_bytes(actual[i].second, expected[i].second)) << actual[i].first;
  }
}

TEST_F(Mixin, OptionsReachThePackingAndTheAssignment) {
  const NetImpl saved;
  saved.save_flashpack(engine_, file(), {.target_dtype = at::kDouble});
  EXPECT_EQ(read_metadata(file()).container.macroblocks.size(), 2U) << "the integer buffer keeps its dtype";
  EXPECT_MENTIONS(error_of([&] { NetImpl::from_flashpack(engine_, file()); }),
                  "dtype mismatch for buffer 'block.norm.running_mean'");
  const auto net = NetImpl::from_flashpack(engine_, file(), {.coerce_dtype = true});
  EXPECT_TRUE(same_bytes(net->scale, saved.scale));
}

}  // namespace
}  // namespace flashpack
