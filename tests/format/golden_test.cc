#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>

#include "tests/format/golden_files.h"

namespace flashpack {
namespace {

using test::file_bytes;
using test::golden_files;
using test::GoldenFile;

class Golden : public ::testing::TestWithParam<GoldenFile> {};

INSTANTIATE_TEST_SUITE_P(Files, Golden, ::testing::ValuesIn(golden_files()),
                         [](const auto& file) { return file.param.name; });

TEST_P(Golden, ReadsAsItsWriterMeantIt) {
  const GoldenFile& golden = GetParam();
  const Metadata metadata = read_metadata(golden.path());
  EXPECT_EQ(metadata.container.version, golden.name.starts_with("v3") ? 3U : 4U);
  EXPECT_EQ(metadata.container.align_bytes, golden.align_bytes);
  EXPECT_EQ(metadata.identity.size_bytes, std::filesystem::file_size(golden.path()));
  EXPECT_EQ(metadata.warnings, std::vector<std::string>{});
  ASSERT_EQ(metadata.records.size(), golden.tensors.size());
  for (std::size_t i = 0; i < golden.tensors.size(); ++i) {
    const TensorRecord& record = metadata.records[i];
    EXPECT_EQ(record.name, golden.tensors[i].name);
    EXPECT_EQ(record.dtype, golden.tensors[i].dtype);
    EXPECT_EQ(record.shape, golden.tensors[i].shape);
    EXPECT_EQ(record.offset_bytes, golden.tensors[i].offset_bytes);
  }
}

TEST_P(Golden, IsWrittenAgainByteForByte) {
  const GoldenFile& golden = GetParam();
  const std::string original = file_bytes(golden.path());
  std::vector<TensorSpec> specs;
  for (const auto& tensor : golden.tensors) specs.push_back({tensor.name, tensor.dtype, tensor.shape});
  const Metadata layout = make_layout(specs, golden.align_bytes);

  std::string rewritten(layout.payload_bytes, '\0');
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const TensorRecord& record = layout.records[i];
    original.copy(&rewritten[record.offset_bytes], record.size_bytes, golden.tensors[i].offset_bytes);
  }
  rewritten += encode_footer(layout);
  EXPECT_EQ(rewritten, original);
}

TEST_P(Golden, CutAnywhereIsRefused) {
  const auto path = std::filesystem::path(::testing::TempDir()) / (GetParam().name + ".cut");
  std::filesystem::copy_file(GetParam().path(), path, std::filesystem::copy_options::overwrite_existing);
  for (std::uintmax_t size = std::filesystem::file_size(path); size-- > 0;) {
    std::filesystem::resize_file(path, size);
    EXPECT_THROW(read_metadata(path), Error) << "cut to " << size;
  }
  std::filesystem::remove(path);
}

TEST(GoldenFiles, AreAllListed) {
  std::size_t on_disk = 0;
  for (const auto& entry : std::filesystem::directory_iterator(FLASHPACK_GOLDEN_DIR)) {
    on_disk += entry.path().extension() == ".flashpack" ? 1U : 0U;
  }
  EXPECT_EQ(golden_files().size(), on_disk);
}

}  // namespace
}  // namespace flashpack
