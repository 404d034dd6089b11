// What is written with checksums is known again when it is read.
#include "flashpack/checksums.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

using testing::GuardedMemory;
using testing::kMiB;

void flip_bit(const std::filesystem::path& path, std::uint64_t bit) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  char byte = 0;
  const auto offset = static_cast<off_t>(bit / 8);
  const bool done = ::pread(fd, &byte, 1, offset) == 1 &&
                    ::pwrite(fd, &(byte = static_cast<char>(byte ^ (1 << bit % 8))), 1, offset) == 1;
  ::close(fd);
  if (!done) throw std::runtime_error("flip a bit of " + path.string());
}

class ChecksumsTest : public ::testing::TestWithParam<Backend> {
 protected:
  // In calls that meet inside stripes, with gaps, from memory of any phase.
  Checksums write_in_parts() {
    FileWriter writer = engine_.create(path_, {.payload_bytes = bytes_.size(), .checksums = true});
    std::vector<std::unique_ptr<GuardedMemory>> sources;
    std::uint64_t at = 0;
    while (at < bytes_.size()) {
      const std::uint64_t size = std::min<std::uint64_t>(5000 + random_() % 1'500'000, bytes_.size() - at);
      sources.push_back(std::make_unique<GuardedMemory>(size, random_() % 2 ? at : 1));
      std::memcpy(sources.back()->data(), bytes_.data() + at, size);
      writer.start_write({.extents = {{at, size, sources.back()->data()}}}).wait();
      at += size;
      const std::uint64_t gap = std::min<std::uint64_t>(100, bytes_.size() - at);
      std::memset(bytes_.data() + at, 0, gap);
      at += gap;
    }
    const Checksums checksums = writer.checksums();
    writer.commit(std::as_bytes(std::span("the footer", 10)));
    return checksums;
  }

  TransferStats load(const Checksums& checksums, CachePolicy cache = CachePolicy::kAuto, std::size_t phase = 0,
                     std::uint64_t begin = 0, std::uint64_t size = 0) {
    if (size == 0) size = bytes_.size() - begin;
    GuardedMemory memory(size, phase);
    const TransferStats stats =
        engine_.load({.files = {{.path = path_, .extents = {{begin, size, memory.data()}}, .checksums = &checksums}},
                      .cache = cache});
    EXPECT_TRUE(testing::same_bytes(memory.data(), bytes_.data() + begin, size));
    return stats;
  }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "model";
  std::mt19937_64 random_{4};
  std::vector<std::byte> bytes_ = testing::random_bytes(6 * kMiB + 4321);
  Engine engine_{{.chunk_bytes = 2 * kMiB, .staging_bytes = 6 * kMiB, .workers = 2, .backend = GetParam()}};
};

INSTANTIATE_TEST_SUITE_P(Backends, ChecksumsTest, ::testing::Values(Backend::kAuto, Backend::kWorkers),
                         [](const auto& backend) { return backend.param == Backend::kAuto ? "Auto" : "Workers"; });

TEST_P(ChecksumsTest, WhatWasWrittenIsVerifiedOnEveryRoute) {
  const Checksums checksums = write_in_parts();
  EXPECT_EQ(checksums.crc32c.size(), 7u);
  EXPECT_EQ(checksums.size_bytes, bytes_.size());
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered, CachePolicy::kAuto}) {
    for (const std::size_t phase : {std::size_t{0}, std::size_t{7}}) {
      EXPECT_EQ(load(checksums, cache, phase).verified_bytes, bytes_.size());
    }
  }
}

TEST_P(ChecksumsTest, TheyDoNotDependOnHowTheFileWasWritten) {
  const Checksums in_parts = write_in_parts();
  FileWriter writer = engine_.create(path_, {.checksums = true});
  writer.write({.extents = {{.size_bytes = bytes_.size(), .source = bytes_.data()}}});
  EXPECT_EQ(writer.checksums(), in_parts);
}

TEST_P(ChecksumsTest, AFlippedBitIsFoundAndItsStripeNamed) {
  const Checksums checksums = write_in_parts();
  for (int round = 0; round < 60; ++round) {
    const std::uint64_t last = 8 * bytes_.size() - 1;
    const std::uint64_t bit = round == 0 ? 0 : round == 1 ? last : random_() % last;
    flip_bit(path_, bit);
    constexpr std::array kPolicies = {CachePolicy::kAuto, CachePolicy::kDirect, CachePolicy::kBuffered};
    GuardedMemory memory(bytes_.size(), random_() % 2);
    try {
      engine_.load({.files = {{.path = path_, .extents = {{0, memory.size(), memory.data()}}, .checksums = &checksums}},
                    .cache = kPolicies[static_cast<std::size_t>(round) % 3]});
      FAIL() << "bit " << bit;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kCorrupt);
      EXPECT_EQ(error.offset_bytes(), bit / 8 / kMiB * kMiB);
      EXPECT_EQ(error.path(), path_);
    }
    flip_bit(path_, bit);
  }
  EXPECT_EQ(load(checksums).verified_bytes, bytes_.size());
}

TEST_P(ChecksumsTest, OfAPartialLoadWholeStripesAreVerified) {
  const Checksums checksums = write_in_parts();
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    EXPECT_EQ(load(checksums, cache, 0, 100, 3 * kMiB).verified_bytes, 2 * kMiB);
    EXPECT_EQ(load(checksums, cache, 3, 5 * kMiB + 1).verified_bytes, bytes_.size() - 6 * kMiB);
    EXPECT_EQ(load(checksums, cache, 0, 10, 500).verified_bytes, 0u);
  }
  flip_bit(path_, 8 * 50);
  EXPECT_EQ(load(checksums, CachePolicy::kAuto, 0, 100, 3 * kMiB).verified_bytes, 2 * kMiB) << "the bit is not read";
}

TEST_P(ChecksumsTest, ExtentsThatOverlapInTheFileAreNotVerifiedAndTheReasonIsTold) {
  const Checksums checksums = write_in_parts();
  GuardedMemory memory(4 * kMiB);
  const TransferStats stats =
      engine_.load({.files = {{.path = path_,
                               .extents = {{0, 2 * kMiB, memory.data()}, {kMiB, 2 * kMiB, memory.data() + 2 * kMiB}},
                               .checksums = &checksums}}});
  EXPECT_EQ(stats.verified_bytes, 0u);
  EXPECT_NE(stats.fallback_reason.find("overlap"), std::string::npos) << stats.fallback_reason;
}

// What is counted twice makes up for what is not read, in number.
TEST_P(ChecksumsTest, SmallExtentsThatOverlapAreNotCalledCorrupt) {
  const Checksums checksums = write_in_parts();
  const std::uint64_t last = 6 * kMiB;
  GuardedMemory memory(8 * kMiB);
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    const TransferStats stats = engine_.load({.files = {{.path = path_,
                                                         .extents = {{last, 2000, memory.data()},
                                                                     {last + 500, 1000, memory.data() + kMiB},
                                                                     {last + 3000, 1321, memory.data() + 2 * kMiB}},
                                                         .checksums = &checksums}},
                                              .cache = cache});
    EXPECT_EQ(stats.verified_bytes, 0u);
    EXPECT_NE(stats.fallback_reason.find("overlap"), std::string::npos) << stats.fallback_reason;
  }
}

TEST_P(ChecksumsTest, WhatIsReadPastThePayloadChangesNothing) {
  const Checksums checksums = write_in_parts();
  const std::uint64_t file_bytes = std::filesystem::file_size(path_);
  GuardedMemory memory(file_bytes);
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    LoadRequest load{.files = {{.path = path_, .extents = {{0, file_bytes, memory.data()}}, .checksums = &checksums}},
                     .cache = cache};
    EXPECT_EQ(engine_.load(load).verified_bytes, bytes_.size());
    // As many bytes are read past the payload as are left out before its end.
    const std::uint64_t past = file_bytes - bytes_.size();
    load.files[0].extents = {{0, bytes_.size() - past, memory.data()},
                             {bytes_.size(), past, memory.data() + bytes_.size()}};
    const TransferStats stats = engine_.load(load);  // Past the page cache the gap is read along.
    EXPECT_EQ(stats.verified_bytes, stats.direct_bytes > 0 ? bytes_.size() : 6 * kMiB);
  }
}

TEST_P(ChecksumsTest, ThoseOfAnotherFileAreAnError) {
  Checksums checksums = write_in_parts();
  checksums.crc32c.pop_back();
  EXPECT_THROW(load(checksums), Error);
  checksums = {.size_bytes = std::uint64_t{1} << 40, .crc32c = std::vector<std::uint32_t>(1u << 20)};
  EXPECT_THROW(load(checksums), Error);
}

TEST_P(ChecksumsTest, AWriterHasThemWhenAskedForAndWhenItsWritesHaveEndedWell) {
  FileWriter without = engine_.create(path_);
  EXPECT_THROW((void)without.checksums(), Error);
  FileWriter empty = engine_.create(path_, {.checksums = true});
  EXPECT_EQ(empty.checksums(), Checksums{});
  FileWriter writer = engine_.create(path_, {.checksums = true});
  Transfer cancelled = writer.start_write({.extents = {{.size_bytes = bytes_.size(), .source = bytes_.data()}}});
  cancelled.cancel();
  try {
    cancelled.wait();
  } catch (const Error&) {
    EXPECT_THROW((void)writer.checksums(), Error);
  }
}

}  // namespace
}  // namespace flashpack
