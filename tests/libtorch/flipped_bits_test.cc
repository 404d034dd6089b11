// One flipped bit in the payload of a legal file: with Verify::kAlways every way of reading gives what was written, or
// an error.
#include <torch/nn/module.h>

#include <algorithm>
#include <set>

#include "flashpack/verify.h"
#include "tests/format/golden_files.h"
#include "tests/libtorch/torch_fixture.h"
#include "torch_binding/libtorch/tensors.h"

namespace flashpack {
namespace {

using test::error_of;

constexpr std::int64_t kPiece = Checksums::kStripeBytes;

/// A file without checksums.
struct LegalFile {
  std::string name;
  Metadata metadata;
  std::string payload;
  bool has_bytes_behind = false;  // The last macroblock.
};

void PrintTo(const LegalFile& file, std::ostream* out) { *out << file.name; }

/// Macroblocks of uint8 tensors by file offset, and bytes behind the last.
LegalFile blocks_file(std::string name, const std::vector<std::pair<std::uint64_t, std::vector<std::int64_t>>>& blocks,
                      std::uint64_t trailing_bytes = 0) {
  LegalFile file{.name = std::move(name), .metadata = {.container = {.version = 4}}};
  Metadata& metadata = file.metadata;
  Container& container = metadata.container;
  for (const auto& [offset, sizes] : blocks) {
    Macroblock block{.dtype = DType::kUInt8, .offset_bytes = offset};
    for (const std::int64_t size : sizes) {
      metadata.records.push_back({.name = "t" + std::to_string(metadata.records.size()),
                                  .dtype = DType::kUInt8,
                                  .shape = {size},
                                  .offset_bytes = offset + block.length_bytes,
                                  .size_bytes = static_cast<std::uint64_t>(size)});
      container.macroblock_of.push_back(static_cast<std::uint32_t>(container.macroblocks.size()));
      block.length_bytes = block.length_elems += static_cast<std::uint64_t>(size);
    }
    container.macroblocks.push_back(block);
    metadata.payload_bytes = std::max(metadata.payload_bytes, offset + block.length_bytes);
  }
  metadata.payload_bytes += trailing_bytes;
  file.has_bytes_behind = trailing_bytes > 0;
  for (std::uint64_t i = 0; i < metadata.payload_bytes; ++i) file.payload += static_cast<char>(i * 167 + i / 4096);
  return file;
}

std::vector<LegalFile> legal_files() {
  std::vector<LegalFile> files = {
      blocks_file("Dense", {{0, {kPiece + 77'777, 3, 0, kPiece, 5}}}),
      blocks_file("AnEmptyBlockBehindAll", {{0, {kPiece + 5}}, {3 * kPiece + 7, {0}}}),
      blocks_file("ThePayloadBeginsLate", {{4099, {9, kPiece}}}),
      blocks_file("AGapOfMoreThanAPiece", {{5, {kPiece, 9}}, {3 * kPiece + 8, {7, 1}}}),
      blocks_file("BlocksAgainstTheOrderOfTheFile", {{kPiece, {8, 3}}, {11, {kPiece - 20}}}),
      blocks_file("AFewBytesBehindTheLastBlock", {{0, {kPiece + 5}}}, 5),
      blocks_file("MoreThanAPieceBehindTheLastBlock", {{0, {kPiece + 5}}}, kPiece + 9),
  };
  for (const test::GoldenFile& golden : test::golden_files()) {
    LegalFile& file = files.emplace_back(golden.name, read_metadata(golden.path()), test::file_bytes(golden.path()));
    file.payload.resize(file.metadata.payload_bytes);
  }
  return files;
}

class FlippedBits : public test::TorchTest, public testing::WithParamInterface<LegalFile> {
 protected:
  using Tensors = std::vector<std::pair<std::string, at::Tensor>>;

  void write(bool checksums) {
    Metadata metadata = GetParam().metadata;
    const auto bytes = std::as_bytes(std::span(GetParam().payload));
    if (checksums) metadata.checksums = {.size_bytes = bytes.size()};
    for (std::size_t begin = 0; checksums && begin < bytes.size(); begin += kPiece) {
      metadata.checksums->crc32c.push_back(
          crc32c(bytes.subspan(begin, std::min<std::size_t>(kPiece, bytes.size() - begin))));
    }
    std::ofstream(file(), std::ios::binary) << GetParam().payload << encode_footer(metadata);
  }

  Tensors read_all(Verify verify) { return read_tensors(engine_, file(), {.verify = verify}).tensors; }

  Tensors read_each() {
    Tensors tensors;
    for (const TensorRecord& record : GetParam().metadata.records) {
      const NameFilter only{.names = {record.name}};
      for (auto& each : read_tensors(engine_, file(), {.only = only, .verify = Verify::kAlways}).tensors) {
        tensors.push_back(std::move(each));
      }
    }
    return tensors;
  }

  Tensors assign() {
    ::torch::nn::Module module;
    const Metadata& metadata = GetParam().metadata;
    for (const TensorRecord& record : metadata.records) {
      module.register_buffer(record.name, at::empty(record.shape, scalar_type(record.dtype)));
    }
    assign_from_file(engine_, module, file(), {.strict_buffers = true, .verify = Verify::kAlways});
    Tensors tensors;
    for (const auto& buffer : module.named_buffers()) tensors.emplace_back(buffer.key(), buffer.value());
    return tensors;
  }

  /// Each way of reading, with all that it reads to be verified.
  void for_each_reader(const std::function<void(const std::function<Tensors()>&)>& check) {
    check([&] { return read_all(Verify::kAlways); });
    check([&] { return read_each(); });
    check([&] { return assign(); });
  }

  /// The ends of the payload, of tensors and of stripes, and what lies beside them.
  std::set<std::uint64_t> places() const {
    const Metadata& metadata = GetParam().metadata;
    std::set<std::uint64_t> ends = {0, metadata.payload_bytes};
    for (const TensorRecord& record : metadata.records) {
      ends.insert({record.offset_bytes, record.offset_bytes + record.size_bytes});
    }
    for (std::uint64_t begin = 0; begin < metadata.payload_bytes; begin += kPiece) ends.insert(begin);
    std::set<std::uint64_t> places;
    for (const std::uint64_t end : ends) {
      if (end > 0) places.insert(end - 1);
      if (end < metadata.payload_bytes) places.insert(end);
    }
    return places;
  }
};

void expect_same(const std::vector<std::pair<std::string, at::Tensor>>& actual,
                 const std::vector<std::pair<std::string, at::Tensor>>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    EXPECT_EQ(actual[i].first, expected[i].first);
    EXPECT_TRUE(test::same_bytes(actual[i].second, expected[i].second)) << actual[i].first;
  }
}

INSTANTIATE_TEST_SUITE_P(LegalFiles, FlippedBits, testing::ValuesIn(legal_files()),
                         [](const auto& file) { return file.param.name; });

TEST_P(FlippedBits, AreAnErrorWhereTheyWereRead) {
  write(false);
  const Tensors sound = read_all(Verify::kAuto);
  write(true);
  if (GetParam().has_bytes_behind) {
    for_each_reader([&](const auto& read) { EXPECT_MENTIONS(error_of(read), "belong to no macroblock"); });
    return;
  }
  for_each_reader([&](const auto& read) { expect_same(read(), sound); });
  for (const std::uint64_t place : places()) {
    SCOPED_TRACE("byte " + std::to_string(place));
    test::flip_bit(file(), 8 * place + place % 8);
    const VerifyReport report = verify_payload(engine_, file(), read_metadata(file()));
    ASSERT_EQ(report.corrupt.size(), 1U);
    EXPECT_EQ(report.corrupt[0].offset_bytes, place / kPiece * kPiece);
    for_each_reader([&](const auto& read) {
      try {
        expect_same(read(), sound);
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), Errc::kCorrupt) << error.what();
      }
    });
    test::flip_bit(file(), 8 * place + place % 8);
  }
}

TEST_P(FlippedBits, CannotBeFoundWithoutChecksumsWhichIsAnError) {
  write(false);
  for_each_reader([&](const auto& read) { EXPECT_MENTIONS(error_of(read), "no checksums"); });
}

}  // namespace
}  // namespace flashpack
