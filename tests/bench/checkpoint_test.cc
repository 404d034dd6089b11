#include "bench/support/checkpoint.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <numeric>

namespace flashpack::bench {
namespace {

TEST(DecoderTensors, ComeToAboutTheSizeAskedFor) {
  for (const std::uint64_t wanted : {std::uint64_t{1} << 28, std::uint64_t{1} << 31, std::uint64_t{1} << 34}) {
    const auto tensors = decoder_tensors(wanted);
    const Metadata metadata = make_layout(tensors, 128);
    EXPECT_NEAR(static_cast<double>(metadata.payload_bytes), static_cast<double>(wanted),
                0.15 * static_cast<double>(wanted));
  }
}

class CheckpointFile : public ::testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove(path_); }
  const std::filesystem::path path_ = "checkpoint_test." + std::to_string(::getpid()) + ".flashpack";
};

TEST_F(CheckpointFile, IsMadeLoadedCheckedAndRemoved) {
  {
    const Checkpoint checkpoint(path_, 32 << 20, false);
    std::vector<std::byte> memory(checkpoint.metadata().payload_bytes);
    EXPECT_THROW(checkpoint.check(memory.data()), std::runtime_error);
    Engine engine;
    engine.load(checkpoint.request(memory.data()));
    checkpoint.check(memory.data());
    checkpoint.check(4096, std::span(memory).subspan(4096));
    EXPECT_THROW(checkpoint.check(0, std::span(memory).subspan(4096)), std::runtime_error);
    memory.back() ^= std::byte{1};
    EXPECT_THROW(checkpoint.check(memory.data()), std::runtime_error);
  }
  EXPECT_FALSE(std::filesystem::exists(path_));
}

TEST_F(CheckpointFile, HasChecksumsThatItsBytesMatch) {
  const Checkpoint checkpoint(path_, 32 << 20, false);
  const Metadata& metadata = checkpoint.metadata();
  std::vector<std::byte> memory(metadata.payload_bytes);
  LoadRequest request{.files = {{.path = path_, .extents = {{0, memory.size(), memory.data()}}}}};
  request.files.front().checksums = &*metadata.checksums;
  Engine engine;
  EXPECT_EQ(engine.load(std::move(request)).verified_bytes, metadata.payload_bytes);
}

TEST_F(CheckpointFile, ThatIsAlreadyThereIsUsedAndKept) {
  Checkpoint(path_, 8 << 20, true);
  const auto made = std::filesystem::last_write_time(path_);
  const Checkpoint again(path_, 16 << 20, true);
  EXPECT_EQ(std::filesystem::last_write_time(path_), made);
}

TEST_F(CheckpointFile, ThatIsAlreadyThereIsNeitherUsedNorRemovedByOneThatWouldNotKeepIt) {
  std::ofstream(path_) << "another process's";
  EXPECT_THROW(Checkpoint(path_, 8 << 20, false), Error);
  EXPECT_EQ(std::filesystem::file_size(path_), 17U);
}

}  // namespace
}  // namespace flashpack::bench
