// Hundreds of random stores on queues that fail in every way at once: each leaves the right bytes, or ends in a clean
// error with nothing in flight.
#include <fcntl.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang.h"
#include "tests/support/pipeline_rig.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

using flashpack::testing::GuardedMemory;
using flashpack::testing::kHang;
using Rig = flashpack::testing::PipelineRig;

constexpr std::uint32_t kChunkBytes = 256 << 10;
constexpr std::uint64_t kFileBytes = 1'500'000;
constexpr int kStores = 80;

class PipelineStoreTest : public ::testing::TestWithParam<Rig::Shape> {
 protected:
  FileUse create(Rig& rig) {
    const auto path = dir_ / std::to_string(files_++);
    UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    return FileUse(File::created(path, std::move(fd)), &rig.disk());
  }

  // Extents that cover the file but for small gaps; their bytes are in `expected`.
  std::vector<SourceExtent> extents(std::vector<std::byte>& expected) {
    std::vector<SourceExtent> extents;
    sources_.clear();
    std::uint64_t at = random_() % 2 ? 0 : random_() % 9000;
    while (at < kFileBytes) {
      const std::uint64_t size = std::min(1 + random_() % (random_() % 2 ? 900'000 : 5000), kFileBytes - at);
      sources_.push_back(std::make_unique<GuardedMemory>(size, random_() % 2 ? at : random_() % 4096));
      const std::byte* bytes = bytes_.data() + random_() % kFileBytes;
      std::memcpy(sources_.back()->data(), bytes, size);
      std::memcpy(expected.data() + at, bytes, size);
      extents.push_back({at, size, sources_.back()->data()});
      at += size + random_() % 200;
    }
    return extents;
  }

  flashpack::testing::TempDir dir_;
  const std::vector<std::byte> bytes_ = flashpack::testing::random_bytes(2 * kFileBytes);
  std::mt19937_64 random_{9};
  std::vector<std::unique_ptr<GuardedMemory>> sources_;
  int files_ = 0;
};

INSTANTIATE_TEST_SUITE_P(Shapes, PipelineStoreTest, ::testing::Values(Rig::Shape::kRealWorkers, Rig::Shape::kTwoQueues),
                         [](const auto& shape) {
                           return shape.param == Rig::Shape::kTwoQueues ? "TwoQueues" : "RealWorkers";
                         });

TEST_P(PipelineStoreTest, EveryStoreLeavesTheRightBytesOrACleanError) {
  int right = 0;
  int failed = 0;
  for (int round = 0; round < kStores; ++round) {
    SCOPED_TRACE(round);
    const bool often = random_() % 4 == 0;
    const flashpack::testing::Faults faults{.short_percent = static_cast<int>(random_() % 40),
                                            .interrupt_percent = static_cast<int>(random_() % 30),
                                            .error_percent = often ? 4 : 0,
                                            .refuse_percent = random_() % 4 == 0 ? 10 : 0,
                                            .nothing_percent = static_cast<int>(random_() % 5)};
    Rig rig(static_cast<unsigned>(random_()), faults, GetParam(), kChunkBytes,
            2 + static_cast<std::uint32_t>(random_() % 3));
    const FileUse open = create(rig);
    const std::filesystem::path& path = open->file.path();
    std::vector<std::byte> expected(kFileBytes);
    auto [state, transfer] = rig.start_store(open, extents(expected), random_() % 50 == 0);
    if (random_() % 20 == 0) transfer.cancel();
    ASSERT_TRUE(transfer.wait_for(kHang)) << "it hangs";
    EXPECT_EQ(transfer.progress().outstanding, 0u);
    try {
      transfer.wait();
      ++right;
      auto written = flashpack::testing::read_file(path);
      written.resize(kFileBytes);
      ASSERT_TRUE(testing::same_bytes(written.data(), expected.data(), kFileBytes));
      StripeSums sums(0, kFileBytes);
      sums.add(0, expected);
      for (std::uint64_t stripe = 0; stripe * Checksums::kStripeBytes < kFileBytes; ++stripe) {
        constexpr std::uint32_t kStripeBytes = Checksums::kStripeBytes;
        EXPECT_EQ(state->driver.parts.front().planned->sums->crc32c(stripe, kStripeBytes),
                  sums.crc32c(stripe, kStripeBytes));
      }
    } catch (const Error& error) {
      ++failed;
      EXPECT_TRUE(error.code() == std::errc::io_error || error.code() == std::errc::interrupted ||
                  error.code() == std::errc::resource_unavailable_try_again || error.code() == Errc::kCancelled)
          << error.what();
      EXPECT_EQ(error.path(), path);
    }
    rig.stop();
    EXPECT_TRUE(rig.idle());
    std::filesystem::remove(path);
  }
  // A soak in which nothing fails, or nothing succeeds, shows nothing.
  EXPECT_GT(right, kStores / 3);
  EXPECT_GT(failed, kStores / 20);
}

}  // namespace
}  // namespace flashpack::internal
