#include "flashpack/version.h"

#include <gtest/gtest.h>

#include <string>

namespace {

TEST(Version, IsThatOfTheProject) {
  EXPECT_STREQ(FLASHPACK_VERSION_STRING, FLASHPACK_PROJECT_VERSION);
  const std::string numbers = std::to_string(FLASHPACK_VERSION_MAJOR) + "." + std::to_string(FLASHPACK_VERSION_MINOR) +
                              "." + std::to_string(FLASHPACK_VERSION_PATCH);
  EXPECT_EQ(numbers, FLASHPACK_PROJECT_VERSION);
}

TEST(Version, OfTheLibraryIsThatOfItsHeader) { EXPECT_STREQ(flashpack::version(), FLASHPACK_VERSION_STRING); }

TEST(Version, NumberGrowsWithEachPart) {
  EXPECT_EQ(FLASHPACK_VERSION_NUMBER / 10000, FLASHPACK_VERSION_MAJOR);
  EXPECT_EQ(FLASHPACK_VERSION_NUMBER / 100 % 100, FLASHPACK_VERSION_MINOR);
  EXPECT_EQ(FLASHPACK_VERSION_NUMBER % 100, FLASHPACK_VERSION_PATCH);
}

}  // namespace
