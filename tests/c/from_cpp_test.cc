// The C header in C++, in a program that has the C++ engine of its own beside the one in the library.
#include <gtest/gtest.h>

#include <array>

#include "flashpack/engine.h"
#include "flashpack/flashpack.h"

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

}  // namespace
