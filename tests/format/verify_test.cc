#include "flashpack/verify.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "engine/ground/unique_fd.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

class VerifyTest : public ::testing::Test {
 protected:
  // Tensors of 900 KB each, so that they and the stripes do not fall together.
  Metadata write(int tensors, bool checksums = true) {
    std::vector<TensorSpec> specs;
    for (int i = 0; i < tensors; ++i) specs.push_back({"t" + std::to_string(i), DType::kUInt8, {900'000}});
    Metadata metadata = make_layout(specs, 128);
    const auto bytes = testing::random_bytes(metadata.payload_bytes);
    FileWriter writer = engine_.create(path_, {.payload_bytes = bytes.size(), .checksums = true});
    writer.write({.extents = {{.size_bytes = bytes.size(), .source = bytes.data()}}});
    if (checksums) metadata.checksums = writer.checksums();
    const std::string footer = encode_footer(metadata);
    writer.commit(std::as_bytes(std::span(footer)));
    return read_metadata(path_);
  }

  void flip(std::uint64_t offset, int bit = 0) {
    std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(offset));
    const int byte = file.get();
    file.seekp(static_cast<std::streamoff>(offset));
    file.put(static_cast<char>(byte ^ (1 << bit)));
  }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "model";
  Engine engine_{{.chunk_bytes = 1u << 20, .staging_bytes = 4u << 20, .workers = 2}};
};

TEST_F(VerifyTest, ASoundFileIsVerifiedToTheLastByte) {
  const Metadata metadata = write(150);  // More than two windows.
  std::vector<std::uint64_t> told;
  const VerifyReport report = verify_payload(engine_, path_, metadata, [&](auto done) { told.push_back(done); });
  EXPECT_EQ(report.verified_bytes, metadata.payload_bytes);
  EXPECT_TRUE(report.corrupt.empty());
  EXPECT_EQ(told, (std::vector<std::uint64_t>{64u << 20, 128u << 20, metadata.payload_bytes}));
}

TEST_F(VerifyTest, AnOpenFileIsVerifiedWhateverStandsAtThePathByNow) {
  const Metadata before = write(80);
  const internal::UniqueFd file = internal::open_file(path_);
  const Metadata metadata = read_metadata(file.get(), path_);
  EXPECT_EQ(metadata.identity, before.identity);
  write(3);
  EXPECT_EQ(verify_payload(engine_, file.get(), path_, metadata).verified_bytes, metadata.payload_bytes);
  EXPECT_EQ(read_metadata(file.get(), path_).records.size(), 80u);
}

TEST_F(VerifyTest, EveryCorruptStripeIsNamedWithItsTensors) {
  const Metadata metadata = write(150);
  flip(5 << 20);
  flip((7 << 20) - 1, 7);
  flip(metadata.payload_bytes - 1);
  const VerifyReport report = verify_payload(engine_, path_, read_metadata(path_));
  ASSERT_EQ(report.corrupt.size(), 3u);
  EXPECT_EQ(report.corrupt[0].offset_bytes, 5u << 20);
  EXPECT_EQ(report.corrupt[1].offset_bytes, 6u << 20);
  EXPECT_EQ(report.corrupt[2].offset_bytes + report.corrupt[2].size_bytes, metadata.payload_bytes);
  EXPECT_EQ(report.verified_bytes, metadata.payload_bytes - (2u << 20) - report.corrupt[2].size_bytes);
  EXPECT_EQ(report.corrupt[0].tensors, R"("t5", "t6")");
}

TEST_F(VerifyTest, AFileWithoutChecksumsCannotBeVerified) {
  const Metadata metadata = write(1, false);
  EXPECT_FALSE(metadata.checksums.has_value());
  try {
    verify_payload(engine_, path_, metadata);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kBadFile);
    EXPECT_NE(std::string(error.what()).find("no checksums"), std::string::npos) << error.what();
  }
}

// What is read from a footer with one bit flipped is the same as without, or an error.
TEST_F(VerifyTest, AFlippedBitInTheFooterIsFoundOrHarmless) {
  const Metadata metadata = write(3);
  const std::string expected = encode_footer(metadata);
  int found = 0;
  int harmless = 0;
  for (std::uint64_t bit = 8 * metadata.payload_bytes; bit < 8 * metadata.identity.size_bytes; ++bit) {
    flip(bit / 8, static_cast<int>(bit % 8));
    try {
      const Metadata again = read_metadata(path_);
      ++harmless;
      EXPECT_EQ(again.records.size(), metadata.records.size());
      EXPECT_EQ(again.checksums, metadata.checksums);
      ASSERT_EQ(encode_footer(again), expected) << "bit " << bit % 8 << " of byte " << bit / 8;
    } catch (const Error& error) {
      ++found;
      EXPECT_EQ(error.code(), Errc::kBadFile) << error.what();
    }
    flip(bit / 8, static_cast<int>(bit % 8));
  }
  EXPECT_GT(found, 8 * static_cast<int>(expected.size()) * 9 / 10);
  EXPECT_GT(harmless, 0) << "the name of the key that says the footer's checksum";
}

}  // namespace
}  // namespace flashpack
