// The C header in C++, in a program that has the C++ engine of its own beside the one in the library.
#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <string>

#include "engine/tuning/keep_profile.h"
#include "flashpack/engine.h"
#include "flashpack/flashpack.h"
#include "flashpack/tuning.h"
#include "tests/support/temp_dir.h"

namespace {

const char* const kPath = FLASHPACK_GOLDEN_DIR "/v3_f32_align128.flashpack";

TEST(CApiFromCpp, LoadsBesideAnEngineOfTheProgram) {
  flashpack::Engine engine;
  std::array<float, 4> mine{};
  engine.load({.files = {{.path = kPath, .extents = {{.size_bytes = sizeof mine, .target = mine.data()}}}}});

  flashpack_engine* theirs = nullptr;
  flashpack_error* error = nullptr;
  ASSERT_EQ(flashpack_engine_create(nullptr, &theirs, &error), FLASHPACK_OK) << flashpack_error_message(error);
  std::array<float, 4> others{};
  flashpack_extent extent{};
  extent.size_bytes = sizeof others;
  extent.target = others.data();
  flashpack_load_request request{};
  request.struct_size = sizeof request;
  request.paths = &kPath;
  request.path_count = 1;
  request.extents = &extent;
  request.extent_count = 1;
  EXPECT_EQ(flashpack_load(theirs, &request, &error), FLASHPACK_OK) << flashpack_error_message(error);
  flashpack_engine_destroy(theirs);
  EXPECT_EQ(mine, others);
}

TEST(CApiFromCpp, NoExceptionLeavesACall) {
  flashpack_checkpoint* checkpoint = nullptr;
  EXPECT_EQ(flashpack_checkpoint_open("/no/such/file", &checkpoint, nullptr), ENOENT);
}

TEST(CApiFromCpp, OptionsAreThoseThatWereKeptForTheDisk) {
  const flashpack::testing::TempDir dir;
  ::setenv("XDG_CONFIG_HOME", dir.path().c_str(), 1);
  ::unsetenv("FLASHPACK_TUNE");
  flashpack_engine_options options{};
  options.struct_size = sizeof options;
  options.queue_depth = 5;
  flashpack_error* error = nullptr;
  EXPECT_EQ(flashpack_tuned_options(dir.path().c_str(), &options, &error), FLASHPACK_NOT_FOUND);
  EXPECT_NE(std::string(flashpack_error_message(error)), "");
  flashpack_error_destroy(error);
  EXPECT_EQ(options.queue_depth, 5u);

  flashpack::EngineOptions kept;
  kept.chunk_bytes = 8u << 20;
  kept.queue_depth = 16;
  kept.workers = 3;
  kept.staging_bytes = 256u << 20;
  kept.backend = flashpack::Backend::kWorkers;
  try {
    flashpack::internal::keep_profile(dir.path(), kept, flashpack::profiles_path());
  } catch (const flashpack::Error& refused) {
    GTEST_SKIP() << refused.what();
  }
  ASSERT_EQ(flashpack_tuned_options(dir.path().c_str(), &options, &error), FLASHPACK_OK);
  EXPECT_EQ(options.chunk_bytes, kept.chunk_bytes);
  EXPECT_EQ(options.queue_depth, kept.queue_depth);
  EXPECT_EQ(options.workers, kept.workers);
  EXPECT_EQ(options.staging_bytes, kept.staging_bytes);
  EXPECT_EQ(options.backend, FLASHPACK_BACKEND_WORKERS);
  std::array<char, 4096> own{};
  options.staging = own.data();
  options.staging_bytes = own.size();
  ASSERT_EQ(flashpack_tuned_options(dir.path().c_str(), &options, &error), FLASHPACK_OK);
  EXPECT_EQ(options.staging_bytes, own.size()) << "the caller's memory is as large as it is";
}

}  // namespace
