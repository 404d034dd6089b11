#include "tests/format/golden_files.h"
#include "tests/libtorch/torch_fixture.h"

namespace flashpack {
namespace {

using test::error_of;
using test::file_content;
using test::names_of;
using test::same_bytes;
using test::TorchTest;

class Pack : public TorchTest {};

TEST_F(Pack, WritesEachGoldenFileAgainByteForByteFromItsTensors) {
  for (const test::GoldenFile& golden : test::golden_files()) {
    const auto loaded = read_tensors(engine_, golden.path());
    pack(loaded.tensors,
         {.name_order = names_of(loaded.tensors), .align_bytes = golden.align_bytes, .checksum = false});
    EXPECT_EQ(file_content(file()), file_content(golden.path())) << golden.name;
  }
}

TEST_F(Pack, ZeroDimAndEmptyTensorsKeepTheirShapes) {
  pack({{"scale", at::scalar_tensor(2.5)}, {"none", at::empty({0, 3})}, {"w", at::ones({2})}});
  EXPECT_TRUE(same_bytes(read_one("scale"), at::scalar_tensor(2.5)));
  EXPECT_EQ(read_one("none").sizes(), at::IntArrayRef({0, 3}));
}

TEST_F(Pack, WritesTheValuesOfConjugatedNegatedExpandedAndGradRequiringTensors) {
  const at::Tensor complex = at::randn({4}, at::kComplexFloat);
  const StateDict tensors = {{"conj", complex.conj()},
                             {"neg", at::_neg_view(at::randn({4}))},
                             {"imag", at::imag(complex.conj())},
                             {"expanded", at::ones({1, 3}).expand({5, 3})},
                             {"every_other", at::arange(10).slice(0, 0, 10, 2)},
                             {"leaf", at::randn({3}).requires_grad_()},
                             {"channels_last", at::randn({2, 3, 4, 5}).contiguous(at::MemoryFormat::ChannelsLast)}};
  ASSERT_TRUE(tensors[0].second.is_conj());
  ASSERT_TRUE(tensors[1].second.is_neg());
  pack(tensors);
  for (const auto& [name, tensor] : tensors) EXPECT_TRUE(same_bytes(read_one(name), tensor)) << name;
}

TEST_F(Pack, WritesPairsOf4BitFloatsInAnyOrderInMemory) {
  const at::Tensor bytes = at::randint(256, {60, 70}, at::kByte);
  pack({{"transposed", bytes.t().view(at::kFloat4_e2m1fn_x2)}});
  EXPECT_TRUE(at::equal(read_one("transposed").view(at::kByte), bytes.t()));
}

TEST_F(Pack, PutsTheLargestFirstAndFollowsNameOrderWhenThereIsOne) {
  const StateDict tensors = {{"small", at::ones({1})}, {"large", at::ones({9})}, {"medium", at::ones({4})}};
  pack(tensors);
  EXPECT_EQ(read_tensors(engine_, file()).tensors[0].first, "large");
  pack(tensors, {.name_order = std::vector<std::string>{"medium", "absent", "small"}});
  const auto loaded = read_tensors(engine_, file());
  ASSERT_EQ(loaded.tensors.size(), 2U);
  EXPECT_EQ(loaded.tensors[0].first, "medium");
  EXPECT_EQ(loaded.tensors[1].first, "small");
}

TEST_F(Pack, TargetDTypeCastsFloatingPointTensorsAsTorchDoesAndLeavesTheRest) {
  const at::Tensor ids = at::tensor({1, 2, 70001}, at::kLong);
  const at::Tensor scaled = at::ones({3}).to(at::ScalarType::Float8_e4m3fn);
  const at::Tensor weight = at::randn({4, 4});
  pack({{"ids", ids}, {"scaled", scaled}, {"weight", weight.t()}}, {.target_dtype = at::kHalf});
  EXPECT_TRUE(same_bytes(read_one("ids"), ids));
  EXPECT_TRUE(same_bytes(read_one("scaled"), scaled));
  EXPECT_TRUE(same_bytes(read_one("weight"), weight.t().to(at::kHalf)));
}

TEST_F(Pack, ACastToIntegersIsRefusedBeforeAnythingIsWritten) {
  const StateDict tensors = {{"kept", at::ones({1}, at::kByte)}, {"ids", at::tensor({1, 300}, at::kLong)}};
  const Error error = error_of([&] { pack(tensors, {.target_dtype = at::kByte}); });
  EXPECT_EQ(error.code(), Errc::kInvalidArgument);
  EXPECT_MENTIONS(error, "tensor 'ids' could lose values");
  EXPECT_TRUE(std::filesystem::is_empty(directory_));
}

TEST_F(Pack, ConvertsTensorsLargerThanABufferPartByPart) {
  constexpr std::int64_t kElements = 9 << 20;  // 36 MiB as they are, 72 MiB as doubles.
  const at::Tensor flat = at::arange(kElements, at::kFloat);
  const at::Tensor wide = flat.view({3, kElements / 3}).t();
  const at::Tensor one_row = flat.view({1, kElements});
  const at::Tensor deep = flat.view({2, 2, kElements / 4}).transpose(1, 2);
  pack({{"flat", flat}, {"wide", wide}, {"one_row", one_row}, {"deep", deep}, {"few", at::arange(7, at::kFloat)}},
       {.target_dtype = at::kDouble});
  EXPECT_TRUE(same_bytes(read_one("deep"), deep.to(at::kDouble)));
  EXPECT_TRUE(same_bytes(read_one("few"), at::arange(7, at::kFloat).to(at::kDouble)));
  EXPECT_TRUE(same_bytes(read_one("flat"), flat.to(at::kDouble)));
  EXPECT_TRUE(same_bytes(read_one("wide"), wide.to(at::kDouble)));
  EXPECT_TRUE(same_bytes(read_one("one_row"), one_row.to(at::kDouble)));
}

TEST_F(Pack, ConvertingALargeTensorTakesLittleMemory) {
  const at::Tensor wide = at::ones({2, 1 << 25}).t();  // 256 MiB
  const test::AddressSpaceLimit limit(std::uint64_t{200} << 20);
  EXPECT_NO_THROW(pack({{"wide", wide}}));
}

TEST_F(Pack, ManySmallConversionsShareBuffersThatAreUsedAgain) {
  StateDict tensors;
  for (int i = 0; i < 300; ++i) tensors.emplace_back(std::to_string(i), at::full({100'000 + i}, i, at::kFloat));
  pack(tensors, {.target_dtype = at::kDouble});  // 240 MB through four buffers of 16 MiB.
  for (const auto& [name, tensor] : read_tensors(engine_, file()).tensors) {
    EXPECT_TRUE(tensor.eq(std::stoi(name)).all().item<bool>()) << name;
  }
}

TEST_F(Pack, PutsChecksumsIntoTheFooterUnlessToldOtherwise) {
  const StateDict tensors = {{"a", at::randn({1000})}};
  pack(tensors);
  EXPECT_TRUE(read_metadata(file()).checksums.has_value());
  pack(tensors, {.checksum = false});
  EXPECT_FALSE(read_metadata(file()).checksums.has_value());
}

TEST_F(Pack, PutsMetadataIntoTheFooterAndRefusesWhatNoReaderTakesBeforeAnythingIsWritten) {
  const StateDict tensors = {{"a", at::ones({3})}};
  const Error error = error_of([&] { pack(tensors, {.metadata = {{"a", "\xff"}}}); });
  EXPECT_EQ(error.code(), Errc::kInvalidArgument);
  EXPECT_TRUE(std::filesystem::is_empty(directory_));
  pack(tensors, {.metadata = {{"format", "pt"}}});
  EXPECT_EQ(read_metadata(file()).user_metadata.at("format"), "pt");
}

TEST_F(Pack, CountsThePayloadItWrote) {
  const auto stats = pack_to_file(engine_, {{"a", at::ones({1000})}, {"b", at::ones({24}).to(at::kDouble)}}, file());
  EXPECT_EQ(stats.requested_bytes, 4000U + 192U);
  EXPECT_GT(stats.seconds, 0);
  EXPECT_NE(stats.backend, Backend::kAuto);
}

TEST_F(Pack, RefusesWhatTheFormatCannotHoldNamingTheTensorAndKeepsTheOldFile) {
  pack({{"old", at::ones({3})}});
  const std::string before = file_content(file());
  const at::Tensor quantised = at::quantize_per_tensor(at::ones({2}), 0.1, 0, at::kQInt8);
  const StateDict bad = {{"undefined", at::Tensor()},
                         {"not dense", at::ones({2, 2}).to_sparse()},
                         {"meta", at::empty({2}, at::TensorOptions(at::kMeta))},
                         {"quantised", quantised},
                         {"Unsupported dtype", at::empty({2}, at::kBits8)}};
  for (const auto& [cause, tensor] : bad) {
    const Error error = error_of([&] { pack({{"fine", at::ones({1})}, {"bad", tensor}}); });
    EXPECT_EQ(error.code(), Errc::kInvalidArgument);
    EXPECT_EQ(error.path(), file());
    EXPECT_MENTIONS(error, "tensor 'bad'");
    EXPECT_MENTIONS(error, cause);
    EXPECT_MENTIONS(error, file().string());
  }
  EXPECT_MENTIONS(error_of([&] { pack({}); }), "No tensors to pack");
  EXPECT_MENTIONS(error_of([&] { pack({{"x", at::ones({1})}}, {.target_dtype = at::kQInt8}); }), "Unsupported dtype");
  EXPECT_EQ(error_of([&] { pack({{"x", at::ones({1})}, {"x", at::ones({2})}}); }).code(), Errc::kInvalidArgument);
  EXPECT_EQ(file_content(file()), before);
}

TEST_F(Pack, DestinationsThatCannotBeWrittenAreErrorsOfTheSystemWithThePath) {
  const StateDict tensors = {{"x", at::ones({3})}};
  const auto missing = directory_ / "absent" / "x.flashpack";
  Error error = error_of([&] { pack_to_file(engine_, tensors, missing); });
  EXPECT_EQ(error.code(), std::errc::no_such_file_or_directory);
  EXPECT_MENTIONS(error, missing.string());

  error = error_of([&] { pack_to_file(engine_, tensors, directory_); });
  EXPECT_MENTIONS(error, directory_.string());

  const std::filesystem::path read_only = "/sys/kernel/x.flashpack";  // Refused to root, too.
  error = error_of([&] { pack_to_file(engine_, tensors, read_only); });
  EXPECT_EQ(error.code().category(), std::generic_category());
  EXPECT_MENTIONS(error, read_only.string());
  EXPECT_TRUE(std::filesystem::is_empty(directory_));
}

}  // namespace
}  // namespace flashpack
