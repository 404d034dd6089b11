#include <c10/core/InferenceMode.h>
#include <sys/stat.h>

#include "flashpack/format.h"
#include "tests/format/golden_files.h"
#include "tests/torch/torch_fixture.h"
#include "torch_binding/tensors.h"

namespace flashpack {
namespace {

using test::error_of;
using test::file_content;
using test::same_bytes;
using test::TorchTest;

constexpr std::int64_t kMiB = std::int64_t{1} << 20;

// Any bit pattern, NaNs and all; bools are 0 or 1.
at::Tensor random_bits(at::ScalarType type, std::int64_t numel) {
  if (type == at::kBool) return at::randint(0, 2, {numel}).to(at::kBool);
  const auto size = static_cast<std::int64_t>(c10::elementSize(type));
  return at::randint(0, 256, {numel * size}, at::kByte).view(type);
}

class EveryDType : public TorchTest, public ::testing::WithParamInterface<DType> {};

TEST_P(EveryDType, ComesBackBitEqualWithItsShape) {
  const at::Tensor tensor = random_bits(scalar_type(GetParam()), 3 * 5 * 7).view({3, 5, 7});
  pack({{"x", tensor}});
  EXPECT_TRUE(same_bytes(read_one("x"), tensor));
  EXPECT_EQ(read_metadata(file()).macroblocks[0].dtype, GetParam());
}

TEST_P(EveryDType, IsWrittenContiguousWhateverItsStrides) {
  const at::Tensor tensor = random_bits(scalar_type(GetParam()), 6 * 4).view({6, 4}).t();
  pack({{"x", tensor}});
  EXPECT_TRUE(same_bytes(read_one("x"), tensor.contiguous()));
}

std::vector<DType> every_dtype() {
  std::vector<DType> all;
  for (int i = 0; i <= static_cast<int>(DType::kFloat8E8M0FNU); ++i) all.push_back(static_cast<DType>(i));
  return all;
}

INSTANTIATE_TEST_SUITE_P(All, EveryDType, ::testing::ValuesIn(every_dtype()),
                         [](const auto& each) { return std::string(dtype_name(each.param)); });

class Golden : public TorchTest, public ::testing::WithParamInterface<test::GoldenFile> {};

TEST_P(Golden, IsWrittenAgainByteForByteFromItsTensors) {
  const auto loaded = read_tensors(engine_, GetParam().path());
  PackOptions options{.align_bytes = GetParam().align_bytes};
  options.name_order.emplace();
  for (const auto& [name, tensor] : loaded.tensors) options.name_order->push_back(name);
  pack(loaded.tensors, options);
  EXPECT_EQ(file_content(file()), file_content(GetParam().path()));
}

INSTANTIATE_TEST_SUITE_P(All, Golden, ::testing::ValuesIn(test::golden_files()),
                         [](const auto& each) { return each.param.name; });

class Pack : public TorchTest {};

TEST_F(Pack, ZeroDimAndEmptyTensorsKeepTheirShapes) {
  pack({{"scale", at::scalar_tensor(2.5)}, {"none", at::empty({0, 3})}, {"w", at::ones({2})}});
  EXPECT_TRUE(same_bytes(read_one("scale"), at::scalar_tensor(2.5)));
  EXPECT_EQ(read_one("none").sizes(), at::IntArrayRef({0, 3}));
}

TEST_F(Pack, WritesTheValuesOfConjugatedNegatedExpandedAndGradRequiringTensors) {
  const at::Tensor complex = at::randn({4}, at::kComplexFloat);
  const StateDict tensors = {{"conj", complex.conj()},
                             {"neg", at::imag(complex.conj())},
                             {"expanded", at::ones({1, 3}).expand({5, 3})},
                             {"every_other", at::arange(10).slice(0, 0, 10, 2)},
                             {"leaf", at::randn({3}).requires_grad_()},
                             {"channels_last", at::randn({2, 3, 4, 5}).contiguous(at::MemoryFormat::ChannelsLast)}};
  ASSERT_TRUE(tensors[0].second.is_conj());
  ASSERT_TRUE(tensors[1].second.is_neg());
  pack(tensors);
  for (const auto& [name, tensor] : tensors) EXPECT_TRUE(same_bytes(read_one(name), tensor)) << name;
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

TEST_F(Pack, TargetDTypeCastsEveryTensorAsTorchDoes) {
  const at::Tensor ids = at::tensor({1, 2, 70001}, at::kLong);
  const at::Tensor weight = at::randn({4, 4});
  pack({{"ids", ids}, {"weight", weight.t()}}, {.target_dtype = at::kHalf});
  EXPECT_TRUE(same_bytes(read_one("ids"), ids.to(at::kHalf)));
  EXPECT_TRUE(same_bytes(read_one("weight"), weight.t().to(at::kHalf)));
}

TEST_F(Pack, ConvertsTensorsLargerThanAGroupSliceBySlice) {
  const at::Tensor flat = at::arange(9 * kMiB, at::kInt);
  const at::Tensor wide = flat.view({3, 3 * kMiB}).t();
  const at::Tensor one_row = flat.view({1, 9 * kMiB});
  pack({{"flat", flat}, {"wide", wide}, {"one_row", one_row}}, {.target_dtype = at::kDouble});
  EXPECT_TRUE(same_bytes(read_one("flat"), flat.to(at::kDouble)));
  EXPECT_TRUE(same_bytes(read_one("wide"), wide.to(at::kDouble)));
  EXPECT_TRUE(same_bytes(read_one("one_row"), one_row.to(at::kDouble)));
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
  const StateDict bad = {{"a", at::Tensor()},
                         {"b", at::ones({2, 2}).to_sparse()},
                         {"c", at::empty({2}, at::TensorOptions(at::kMeta))},
                         {"d", quantised},
                         {"e", at::empty({2}, at::kBits8)}};
  for (const auto& each : bad) {
    const Error error = error_of([&] { pack({{"fine", at::ones({1})}, each}); });
    EXPECT_EQ(error.code(), Errc::kInvalidArgument);
    EXPECT_EQ(error.path(), file());
    EXPECT_MENTIONS(error, "'" + each.first + "'");
    EXPECT_MENTIONS(error, file().string());
  }
  EXPECT_MENTIONS(error_of([&] { pack({}); }), "No tensors to pack");
  EXPECT_MENTIONS(error_of([&] { pack({{"x", at::empty({0})}}); }), "Nothing to pack");
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

class Read : public TorchTest {};

TEST_F(Read, ATensorHasAStorageOfItsOwnThatTorchMayWriteAndResize) {
  pack({{"a", at::ones({1000})}, {"b", at::zeros({500})}});
  auto loaded = read_tensors(engine_, file());
  at::Tensor a = loaded.tensors[0].second;
  at::Tensor b = loaded.tensors[1].second;
  EXPECT_EQ(a.storage().nbytes(), 4000U);
  EXPECT_EQ(b.storage().nbytes(), 2000U);
  EXPECT_EQ(b.storage_offset(), 0);
  EXPECT_FALSE(b.is_view());
  a.fill_(7);
  EXPECT_EQ(b._version(), 0) << "version counters are shared";
  EXPECT_EQ(b.abs().max().item<float>(), 0);
  b.resize_({4000}).fill_(3);
  EXPECT_EQ(a.min().item<float>(), 7);
}

TEST_F(Read, ATensorOutlivesTheFileTheEngineAndItsNeighbours) {
  const at::Tensor saved = at::randn({300, 300});
  pack({{"keep", saved}, {"drop", at::ones({100})}});
  at::Tensor kept;
  {
    Engine engine;
    kept = read_tensors(engine, file()).tensors[0].second;
  }
  pack({{"other", at::zeros({90000})}});
  EXPECT_TRUE(same_bytes(kept, saved));
}

TEST_F(Read, TensorsAreOrdinaryOnesEvenInInferenceMode) {
  pack({{"x", at::ones({3})}, {"none", at::empty({0})}});
  const c10::InferenceMode mode;
  for (const auto& [name, tensor] : read_tensors(engine_, file()).tensors) EXPECT_FALSE(tensor.is_inference()) << name;
}

TEST_F(Read, LiesAtTheFileOffsetsPhaseSoThatItIsReadInPlace) {
  pack({{"large", at::ones({3 * kMiB})}, {"odd", at::ones({1001}, at::kByte)}, {"tail", at::ones({77})}});
  const Metadata metadata = read_metadata(file());
  for (const auto& record : metadata.records) {
    const auto address = reinterpret_cast<std::uintptr_t>(read_one(record.name).const_data_ptr());
    EXPECT_EQ(address % 4096, metadata.offset_bytes(record) % 4096) << record.name;
  }
}

TEST_F(Read, FiltersChooseByNameAndWhatIsFarFromAnyChosenTensorIsNotRead) {
  const at::Tensor last = at::randn({8});
  pack({{"a.weight", at::ones({kMiB})}, {"b.weight", at::ones({kMiB})}, {"c.bias", last}},
       {.name_order = std::vector<std::string>{"a.weight", "b.weight", "c.bias"}});
  auto loaded = read_tensors(engine_, file(), {.ignore = {.suffixes = {".weight"}}});
  ASSERT_EQ(loaded.tensors.size(), 1U);
  EXPECT_TRUE(same_bytes(loaded.tensors[0].second, last));
  EXPECT_EQ(loaded.stats.requested_bytes, 32U);

  loaded =
      read_tensors(engine_, file(), {.only = NameFilter{.prefixes = {"a.", "c."}}, .ignore = {.names = {"c.bias"}}});
  ASSERT_EQ(loaded.tensors.size(), 1U);
  EXPECT_EQ(loaded.tensors[0].first, "a.weight");
  EXPECT_EQ(loaded.stats.requested_bytes, 4U * kMiB);

  EXPECT_TRUE(read_tensors(engine_, file(), {.only = NameFilter{}}).tensors.empty());
}

TEST_F(Read, EveryCachePolicyGivesTheSameBytes) {
  const at::Tensor saved = at::randn({3 * kMiB});
  pack({{"x", saved}});
  for (const CachePolicy cache : {CachePolicy::kAuto, CachePolicy::kDirect, CachePolicy::kBuffered}) {
    const auto loaded = read_tensors(engine_, file(), {.cache = cache});
    EXPECT_TRUE(same_bytes(loaded.tensors[0].second, saved));
    EXPECT_EQ(loaded.stats.requested_bytes, 12U * kMiB);
  }
}

TEST_F(Read, FilesThatCannotBeReadAreErrorsWithThePathAndTheCause) {
  const auto read = [&](const std::filesystem::path& path) { return error_of([&] { read_tensors(engine_, path); }); };
  EXPECT_EQ(read(file("absent")).code(), std::errc::no_such_file_or_directory);
  EXPECT_MENTIONS(read(file("absent")), file("absent").string());
  EXPECT_MENTIONS(read(directory_), directory_.string());

  std::ofstream(file("text")) << "this is no flashpack file";
  EXPECT_EQ(read(file("text")).code(), Errc::kBadFile);
  EXPECT_MENTIONS(read(file("text")), "Bad magic");
  std::ofstream(file("short")) << "tiny";
  EXPECT_MENTIONS(read(file("short")), "File too small");
}

TEST_F(Read, AFileReplacedAfterItsMetadataWasReadIsRefused) {
  pack({{"x", at::ones({100})}});
  const Metadata metadata = read_metadata(file());
  pack({{"x", at::zeros({100})}});
  const std::vector<std::size_t> wanted = {0};
  const Error error = error_of([&] { LoadedRecords(engine_, file(), metadata, wanted, CachePolicy::kAuto); });
  EXPECT_EQ(error.code(), Errc::kFileChanged);
}

}  // namespace
}  // namespace flashpack
