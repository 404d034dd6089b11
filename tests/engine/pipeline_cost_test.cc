// In the program that counts allocations.
#include <fcntl.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/pool.h"
#include "tests/support/counted_new.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/pipeline_rig.h"
#include "tests/support/sanitizers.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

using flashpack::testing::GuardedMemory;
using Rig = flashpack::testing::PipelineRig;

constexpr std::uint32_t kChunkBytes = 128 << 10;
constexpr std::size_t kFewChunks = 4;
constexpr std::size_t kManyChunks = 128;
// Lists that are made once for a transfer grow a few times more for many chunks. That is far from one for each chunk.
constexpr int kGrowth = kManyChunks / 4;

struct Load {
  const char* name;
  CachePolicy cache;
  std::size_t phase;
  bool checksums = false;
  bool report_extents = false;
};

class PipelineCostTest : public ::testing::Test {
 protected:
  struct Ignores final : Completion {
    void landed(std::size_t, std::size_t) noexcept override {}
    void done(Transfer&) noexcept override {}
  };

  PipelineCostTest() { flashpack::testing::write_file(path_, bytes_); }

  // The allocations of all threads until the transfer that `start` returns has ended. Operations that are late, as on a
  // busy disk, allocate what takes their place, so that a slow transfer is repeated a few times.
  template <typename Start>
  static int allocations_of(Start start) {
    constexpr int kMostAttempts = 10;
    for (int attempt = 1;; ++attempt) {
      const int before = flashpack::testing::counted_allocations();
      const auto began = std::chrono::steady_clock::now();
      flashpack::testing::count_allocations_of_all(true);
      start().wait();
      flashpack::testing::count_allocations_of_all(false);
      const bool was_slow = std::chrono::steady_clock::now() - began >= kLate;
      if (!was_slow || attempt == kMostAttempts) return flashpack::testing::counted_allocations() - before;
    }
  }

  Checksums checksums() const {
    StripeSums sums(0, bytes_.size());
    sums.add(0, bytes_);
    Checksums checksums{.size_bytes = bytes_.size()};
    for (std::uint64_t i = 0; i * Checksums::kStripeBytes < bytes_.size(); ++i)
      checksums.crc32c.push_back(sums.crc32c(i, Checksums::kStripeBytes));
    return checksums;
  }

  int allocations_of_load(std::size_t chunks, const Load& wanted) {
    GuardedMemory memory(chunks * kChunkBytes, wanted.phase);
    Rig::Load load{.path = path_,
                   .extents = {{0, memory.size(), memory.data()}},
                   .cache = wanted.cache,
                   .completion = &completion_,
                   .report_extents = wanted.report_extents};
    if (wanted.checksums) load.checksums = checksums();
    return allocations_of([&] { return rig_.start(load); });
  }

  int allocations_of_store(std::size_t chunks, std::size_t phase) {
    const auto path = dir_ / std::to_string(files_++);
    UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    const FileUse open(File::created(path, std::move(fd)), &rig_.disk());
    GuardedMemory memory(chunks * kChunkBytes, phase);
    return allocations_of(
        [&] { return std::move(rig_.start_store(open, {{0, memory.size(), memory.data()}}).transfer); });
  }

  flashpack::testing::TempDir dir_;
  const std::filesystem::path path_ = dir_ / "file";
  const std::vector<std::byte> bytes_ = flashpack::testing::random_bytes(kManyChunks * kChunkBytes);
  int files_ = 0;
  Ignores completion_;
  Rig rig_{1, {}, Rig::Shape::kRealWorkers, kChunkBytes, 8};
};

TEST_F(PipelineCostTest, ALoadAllocatesNothingPerChunk) {
  if (testing::kSanitizer) GTEST_SKIP() << "the sanitizers have their own operator new";
  for (const Load& load : {Load{"in place", CachePolicy::kDirect, 0},
                           {"through slots", CachePolicy::kDirect, 64},
                           {"through the page cache", CachePolicy::kBuffered, 0},
                           {"where the router says", CachePolicy::kAuto, 0},
                           {"with checksums", CachePolicy::kDirect, 0, true},
                           {"told of extents", CachePolicy::kDirect, 64, true, true}}) {
    allocations_of_load(kManyChunks, load);
    const int few = allocations_of_load(kFewChunks, load);
    EXPECT_GT(few, 0) << load.name;
    EXPECT_LE(allocations_of_load(kManyChunks, load), few + kGrowth) << load.name;
  }
}

TEST_F(PipelineCostTest, AStoreAllocatesNothingPerChunk) {
  if (testing::kSanitizer) GTEST_SKIP() << "the sanitizers have their own operator new";
  for (const std::size_t phase : {0u, 64u}) {
    allocations_of_store(kManyChunks, phase);
    const int few = allocations_of_store(kFewChunks, phase);
    EXPECT_GT(few, 0);
    EXPECT_LE(allocations_of_store(kManyChunks, phase), few + kGrowth);
  }
}

}  // namespace
}  // namespace flashpack::internal
