/// Engines whose staging memory is the caller's.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <span>
#include <string>
#include <system_error>

#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

using testing::GuardedMemory;
using testing::kMiB;

std::string refusal_of(const EngineOptions& options) {
  try {
    const Engine engine(options);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kInvalidArgument);
    return error.what();
  }
  return "none";
}

TEST(CallersStagingTest, IsRefusedIfItDoesNotFit) {
  GuardedMemory memory(4 * kMiB);
  std::byte* const begin = memory.data();
  EXPECT_EQ(refusal_of({.chunk_bytes = kMiB, .staging = {begin + 512, 2 * kMiB}}),
            "engine options: staging must begin at a page: invalid argument");
  EXPECT_EQ(refusal_of({.chunk_bytes = kMiB, .staging = {begin, 2 * kMiB - 1}}),
            "engine options: staging must have from 2 to 16384 chunks: invalid argument");
  EXPECT_EQ(refusal_of({.chunk_bytes = kMiB, .staging_bytes = 2 * kMiB, .staging = {begin, 2 * kMiB}}),
            "engine options: staging and staging_bytes exclude each other: invalid argument");
  EXPECT_EQ(refusal_of({.chunk_bytes = kMiB, .staging = {begin, 2 * kMiB}, .numa_node = 0}),
            "engine options: staging and numa_node exclude each other: invalid argument");
}

class CallersStagingOfBackendsTest : public ::testing::TestWithParam<Backend> {};

INSTANTIATE_TEST_SUITE_P(Backends, CallersStagingOfBackendsTest, ::testing::Values(Backend::kAuto, Backend::kWorkers),
                         [](const auto& backend) { return backend.param == Backend::kAuto ? "Auto" : "Workers"; });

TEST(CallersStagingTest, MemoryThatCannotBeWrittenIsRefused) {
  GuardedMemory memory(2 * kMiB);
  ASSERT_EQ(::mprotect(memory.data() + kMiB, kMiB, PROT_READ), 0);
  std::error_code error;
  EXPECT_FALSE(Engine::make({.chunk_bytes = kMiB, .staging = {memory.data(), memory.size()}}, error));
  EXPECT_EQ(error, std::errc::bad_address);
}

TEST_P(CallersStagingOfBackendsTest, LoadsAndStoresGoThroughItAndNothingBesideItIsTouched) {
  const testing::TempDir dir;
  const auto bytes = testing::random_bytes(6 * kMiB + 1234);
  testing::write_file(dir / "file", bytes);
  GuardedMemory staging(3 * kMiB + 100);
  {
    Engine engine({.chunk_bytes = kMiB, .staging = {staging.data(), staging.size()}, .backend = GetParam()});
    EXPECT_EQ(engine.options().staging.data(), staging.data());
    EXPECT_EQ(engine.options().staging_bytes, 0u);
    for (int round = 0; round < 3; ++round) {  // A slot is registered with the ring at its second use.
      GuardedMemory memory(bytes.size(), 77);
      const TransferStats stats =
          engine.load({.files = {{.path = dir / "file", .extents = {{0, memory.size(), memory.data()}}}},
                       .cache = CachePolicy::kDirect});
      EXPECT_TRUE(memory.intact());
      EXPECT_TRUE(testing::same_bytes(memory.data(), bytes.data(), bytes.size()));
      EXPECT_GE(stats.staged_bytes, bytes.size());
      EXPECT_EQ(stats.fallback_reason, "");
      FileWriter writer = engine.create(dir / "new");
      writer.write({.extents = {{0, memory.size(), memory.data()}}});
      writer.commit();
      EXPECT_TRUE(testing::file_has(dir / "new", bytes));
    }
  }
  EXPECT_TRUE(staging.intact());
  for (std::size_t slot = 0; slot < 3; ++slot) {
    const std::span sample(staging.data() + slot * kMiB + 8192, 64);
    EXPECT_NE(std::search(bytes.begin(), bytes.end(), sample.begin(), sample.end()), bytes.end())
        << "no chunk went through slot " << slot;
  }
}

}  // namespace
}  // namespace flashpack
