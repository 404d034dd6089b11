#include "torch_binding/format/verified.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

Metadata layout_of(int tensors, std::int64_t elems) {
  std::vector<TensorSpec> specs;
  for (int i = 0; i < tensors; ++i) specs.push_back({"t" + std::to_string(i), DType::kUInt8, {elems}});
  return make_layout(specs, 128);
}

TEST(Verified, WhereAllIsToBeVerifiedALoadOfPartsOfStripesIsAnError) {
  const testing::TempDir directory;
  const std::filesystem::path path = directory / "model";
  Engine engine({.chunk_bytes = 1u << 20, .staging_bytes = 4u << 20, .workers = 2});
  Metadata metadata = layout_of(2, 900'000);
  const auto bytes = testing::random_bytes(metadata.payload_bytes);
  FileWriter writer = engine.create(path, {.payload_bytes = bytes.size(), .checksums = true});
  writer.write({.extents = {{.size_bytes = bytes.size(), .source = bytes.data()}}});
  metadata.checksums = writer.checksums();
  const std::string footer = encode_footer(metadata);
  writer.commit(std::as_bytes(std::span(footer)));

  const Checkpoint checkpoint = open_checkpoint(path);
  std::vector<std::byte> memory(metadata.payload_bytes);
  const auto load = [&](Verify verify, std::vector<Extent> extents) {
    LoadRequest request{.files = files_of(checkpoint, {std::move(extents)}, verify)};
    return verified(checkpoint, verify, [&] { return engine.load(std::move(request)); }).verified_bytes;
  };
  const Extent whole{.size_bytes = memory.size(), .target = memory.data()};
  Extent most = whole;
  most.size_bytes -= 1;
  EXPECT_EQ(load(Verify::kAlways, {whole}), metadata.payload_bytes);
  EXPECT_EQ(load(Verify::kAuto, {most}), std::uint64_t{1} << 20);
  EXPECT_EQ(load(Verify::kNever, {whole}), 0U);
  std::byte twice{};
  for (const std::vector<Extent>& extents :
       {std::vector{most}, std::vector{whole, {.size_bytes = 1, .target = &twice}}}) {
    try {
      load(Verify::kAlways, extents);
      FAIL() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kInvalidArgument);
      EXPECT_EQ(error.path(), path);
    }
  }
}

TEST(TensorsByOffset, AreCountedPastTheFifth) {
  const Metadata metadata = layout_of(9, 100);
  const TensorsByOffset tensors(metadata);
  EXPECT_EQ(tensors.names_in(0, 100), R"("t0")");
  EXPECT_EQ(tensors.names_in(99, 30), R"("t0", "t1")");
  EXPECT_EQ(tensors.names_in(100, 28), "no tensor");
  EXPECT_EQ(tensors.names_in(0, 1000), R"("t0", "t1", "t2", "t3", "t4" and 3 more)");
}

}  // namespace
}  // namespace flashpack
