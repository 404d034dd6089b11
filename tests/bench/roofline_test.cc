#include "bench/support/roofline.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <system_error>
#include <vector>

#include "engine/ground/host_region.h"
#include "tests/support/temp_dir.h"

namespace flashpack::bench {
namespace {

constexpr std::size_t kBlockBytes = 4096;
constexpr std::size_t kFileBytes = (9u << 20) + 123;

class RooflineTest : public ::testing::Test {
 protected:
  RooflineTest() { flashpack::testing::write_file(path_, bytes_); }

  flashpack::testing::TempDir dir_;
  const std::filesystem::path path_ = dir_ / "file";
  const std::vector<std::byte> bytes_ = flashpack::testing::random_bytes(kFileBytes);
  internal::HostRegion memory_{kFileBytes + kBlockBytes, "a test"};
};

TEST_F(RooflineTest, AWholeFileIsReadWithItsTail) {
  const auto target = memory_.bytes().first(kFileBytes);
  read_direct(path_, target);
  EXPECT_TRUE(std::ranges::equal(target, bytes_));
}

TEST_F(RooflineTest, PiecesOfSeveralFilesGoWhereTheyBelong) {
  const std::filesystem::path copy = dir_ / "copy";
  std::filesystem::copy_file(path_, copy);
  const OpenFile files[] = {{path_, O_RDONLY | O_DIRECT}, {copy, O_RDONLY | O_DIRECT}};
  std::vector<Piece> pieces;
  std::vector<std::byte> expected;
  for (std::size_t i = 0; i < 40; ++i) {
    const std::size_t offset = (40 - i) * 3 * kBlockBytes;
    pieces.push_back({&files[i % 2], offset, memory_.bytes().subspan(i * kBlockBytes, kBlockBytes)});
    expected.insert(expected.end(), bytes_.begin() + static_cast<std::ptrdiff_t>(offset),
                    bytes_.begin() + static_cast<std::ptrdiff_t>(offset + kBlockBytes));
  }
  read_pieces(pieces, 32);
  EXPECT_TRUE(std::ranges::equal(memory_.bytes().first(expected.size()), expected));
}

TEST_F(RooflineTest, ThreadsReadEachPieceToItsPlaceAndTellOfAFileThatEndsEarly) {
  const OpenFile file(path_, O_RDONLY | O_DIRECT);
  const auto target = memory_.bytes().first(kFileBytes);
  const std::vector<Piece> pieces = pieces_of(file, target, 1 << 20);
  read_pieces_by_threads(pieces, 4);
  EXPECT_TRUE(std::ranges::equal(target, bytes_));
  std::filesystem::resize_file(path_, kFileBytes / 2);
  EXPECT_THROW(read_pieces_by_threads(pieces, 4), std::system_error);
}

TEST_F(RooflineTest, EveryReadHasATimeThatIsNoLongerThanAllOfThem) {
  const OpenFile file(path_, O_RDONLY | O_DIRECT);
  const auto target = memory_.bytes().first(kFileBytes);
  const auto begin = std::chrono::steady_clock::now();
  const std::vector<double> seconds = time_reads(pieces_of(file, target, 1 << 20), 4);
  const std::chrono::duration<double> all = std::chrono::steady_clock::now() - begin;
  EXPECT_EQ(seconds.size(), 10U);
  for (const double each : seconds) EXPECT_TRUE(each > 0 && each <= all.count()) << each;
  EXPECT_TRUE(std::ranges::equal(target, bytes_));
}

TEST_F(RooflineTest, AReadPastTheEndIsAnError) {
  const OpenFile file(path_, O_RDONLY | O_DIRECT);
  const Piece piece{&file, 10u << 20, memory_.bytes().first(kBlockBytes)};
  EXPECT_THROW(read_pieces({&piece, 1}, 1), std::system_error);
}

TEST_F(RooflineTest, WhatIsWrittenIsRead) {
  std::ranges::copy(bytes_, memory_.data());
  const std::filesystem::path written = dir_ / "written";
  write_direct(written, memory_.bytes().first(kFileBytes));
  std::filesystem::resize_file(written, kFileBytes);
  EXPECT_TRUE(flashpack::testing::file_has(written, bytes_));
}

}  // namespace
}  // namespace flashpack::bench
