#include "torch_binding/libtorch/tensors.h"

#include <c10/core/InferenceMode.h>

#include "flashpack/checkpoint.h"
#include "tests/libtorch/torch_fixture.h"

namespace flashpack {
namespace {

using test::error_of;
using test::same_bytes;
using test::TorchTest;

constexpr std::int64_t kMi = std::int64_t{1} << 20;

// Any bit pattern, NaNs and all; bools are 0 or 1.
at::Tensor random_bits(at::ScalarType type, std::int64_t numel) {
  if (type == at::kBool) return at::randint(0, 2, {numel}).to(at::kBool);
  const auto size = static_cast<std::int64_t>(c10::elementSize(type));
  return at::randint(0, 256, {numel * size}, at::kByte).view(type);
}

class DTypes : public TorchTest {
 protected:
  // Calls `check` with each of the format's types; a failure in it names the type.
  static void for_each(const std::function<void(DType, at::ScalarType)>& check) {
    for (int i = 0; i <= static_cast<int>(DType::kFloat4E2M1FNX2); ++i) {
      const auto dtype = static_cast<DType>(i);
      SCOPED_TRACE(dtype_name(dtype));
      check(dtype, scalar_type(dtype));
    }
  }
};

TEST_F(DTypes, AreThoseThatTorchCallsByTheSameNames) {
  for_each([](DType dtype, at::ScalarType type) {
    EXPECT_EQ(c10::getDtypeNames(type).first, dtype_name(dtype));
    EXPECT_EQ(c10::elementSize(type), element_bytes(dtype));
    EXPECT_EQ(format_dtype(type), dtype);
  });
}

TEST_F(DTypes, ComeBackBitEqualWithTheirShape) {
  for_each([&](DType dtype, at::ScalarType type) {
    const at::Tensor tensor = random_bits(type, 3 * 5 * 7).view({3, 5, 7});
    pack({{"x", tensor}});
    EXPECT_TRUE(same_bytes(read_one("x"), tensor));
    EXPECT_EQ(read_metadata(file()).container.macroblocks[0].dtype, dtype);
  });
}

TEST_F(DTypes, AreWrittenContiguousWhateverTheStrides) {
  for_each([&](DType, at::ScalarType type) {
    const at::Tensor tensor = random_bits(type, 6 * 4).view({6, 4}).t();
    pack({{"x", tensor}});
    EXPECT_TRUE(same_bytes(read_one("x"), tensor.contiguous()));
  });
}

TEST_F(DTypes, ShareOneFile) {
  StateDict tensors;
  for_each([&](DType dtype, at::ScalarType type) { tensors.emplace_back(dtype_name(dtype), random_bits(type, 10)); });
  pack(tensors);
  for (const auto& [name, tensor] : tensors) EXPECT_TRUE(same_bytes(read_one(name), tensor)) << name;
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
  pack({{"large", at::ones({3 * kMi})}, {"odd", at::ones({1001}, at::kByte)}, {"tail", at::ones({77})}});
  const Metadata metadata = read_metadata(file());
  for (const auto& record : metadata.records) {
    const auto address = reinterpret_cast<std::uintptr_t>(read_one(record.name).const_data_ptr());
    EXPECT_EQ(address % 4096, record.offset_bytes % 4096) << record.name;
  }
  const TransferStats stats = read_tensors(engine_, file(), {.cache = CachePolicy::kDirect}).stats;
  EXPECT_LE(stats.staged_bytes, 3 * 4096U) << "more than the ends went through a copy";
}

TEST_F(Read, FiltersChooseByNameAndWhatIsFarFromAnyChosenTensorIsNotRead) {
  const at::Tensor last = at::randn({8});
  pack({{"a.weight", at::ones({kMi})}, {"b.weight", at::ones({kMi})}, {"c.bias", last}},
       {.name_order = std::vector<std::string>{"a.weight", "b.weight", "c.bias"}});
  auto loaded = read_tensors(engine_, file(), {.ignore = {.suffixes = {".weight"}}});
  ASSERT_EQ(loaded.tensors.size(), 1U);
  EXPECT_TRUE(same_bytes(loaded.tensors[0].second, last));
  EXPECT_EQ(loaded.stats.requested_bytes, 32U);

  loaded =
      read_tensors(engine_, file(), {.only = NameFilter{.prefixes = {"a.", "c."}}, .ignore = {.names = {"c.bias"}}});
  ASSERT_EQ(loaded.tensors.size(), 1U);
  EXPECT_EQ(loaded.tensors[0].first, "a.weight");
  EXPECT_EQ(loaded.stats.requested_bytes, 4U * kMi);

  EXPECT_TRUE(read_tensors(engine_, file(), {.only = NameFilter{}}).tensors.empty());
}

TEST_F(Read, EveryCachePolicyGivesTheSameBytes) {
  const at::Tensor saved = at::randn({3 * kMi});
  pack({{"x", saved}});
  for (const CachePolicy cache : {CachePolicy::kAuto, CachePolicy::kDirect, CachePolicy::kBuffered}) {
    const auto loaded = read_tensors(engine_, file(), {.cache = cache});
    EXPECT_TRUE(same_bytes(loaded.tensors[0].second, saved));
    EXPECT_EQ(loaded.stats.requested_bytes, 12U * kMi);
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

TEST_F(Read, AFileReplacedAfterItsMetadataWasReadIsReadToItsEnd) {
  pack({{"x", at::ones({100})}});
  const Checkpoint checkpoint = open_checkpoint(file());
  pack({{"x", at::zeros({100})}});
  const std::vector<std::size_t> wanted = {0};
  const LoadedRecords loaded(engine_, checkpoint, wanted, CachePolicy::kAuto, Verify::kAuto);
  EXPECT_TRUE(loaded.tensor(0).equal(at::ones({100})));
}

TEST_F(Read, AFileChangedAfterItsMetadataWasReadIsRefused) {
  pack({{"x", at::ones({100})}});
  const Checkpoint checkpoint = open_checkpoint(file());
  std::ofstream(file(), std::ios::app) << "more";
  const std::vector<std::size_t> wanted = {0};
  const Error error = error_of([&] { LoadedRecords(engine_, checkpoint, wanted, CachePolicy::kAuto, Verify::kAuto); });
  EXPECT_EQ(error.code(), Errc::kFileChanged);
}

TEST_F(Read, AFlippedBitIsFoundAndTheTensorsInItsPieceAreNamed) {
  pack({{"large", at::ones({1 << 19})}, {"small", at::ones({3}, at::kDouble)}});
  EXPECT_EQ(read_tensors(engine_, file()).stats.verified_bytes, read_metadata(file()).payload_bytes);
  test::flip_bit(file(), 8 * (read_metadata(file()).payload_bytes - 1));
  const Error error = error_of([&] { read_tensors(engine_, file()); });
  EXPECT_EQ(error.code(), Errc::kCorrupt);
  EXPECT_EQ(error.offset_bytes(), std::uint64_t{2} << 20);
  EXPECT_MENTIONS(error, file().string() + " at 2097152+24");
  EXPECT_MENTIONS(error, "\"small\"");
  EXPECT_EQ(read_tensors(engine_, file(), {.verify = Verify::kNever}).stats.verified_bytes, 0U);
}

TEST_F(Read, APartIsVerifiedWhereItIsReadInWholePiecesAndAlwaysMeansAllOfIt) {
  pack({{"a", at::ones({(1 << 20) + 10}, at::kByte)}, {"b", at::ones({(1 << 20) + 9}, at::kByte)}});
  const std::uint64_t end = read_metadata(file()).payload_bytes;
  const NameFilter a{.names = {"a"}};
  EXPECT_EQ(read_tensors(engine_, file(), {.only = a}).stats.verified_bytes, std::uint64_t{1} << 20);
  EXPECT_GT(read_tensors(engine_, file(), {.only = a, .verify = Verify::kAlways}).stats.verified_bytes,
            (1U << 20) + 10);
  pack({{"a", at::ones({9})}}, {.checksum = false});
  EXPECT_EQ(read_tensors(engine_, file()).stats.verified_bytes, 0U);
  EXPECT_MENTIONS(error_of([&] { read_tensors(engine_, file(), {.verify = Verify::kAlways}); }), "no checksums");
  EXPECT_GT(end, 2U << 20);
}

}  // namespace
}  // namespace flashpack
