/// For tests of profiles: a file of profiles with one in it.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <regex>
#include <span>
#include <string>
#include <string_view>

#include "engine/tuning/keep_profile.h"
#include "flashpack/error.h"
#include "flashpack/tuning.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack::testing {

using testing::kMiB;

inline EngineOptions options_of(std::uint32_t chunk_bytes, std::uint32_t queue_depth, std::uint32_t workers) {
  EngineOptions options;
  options.chunk_bytes = chunk_bytes;
  options.queue_depth = queue_depth;
  options.workers = workers;
  return options;
}

inline bool has(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

/// A directory on a disk that can be recognised, and a file of profiles in it.
class Profiles : public ::testing::Test {
 protected:
  void SetUp() override {
    ::unsetenv("FLASHPACK_TUNE");
    try {
      internal::keep_profile(dir_.path(), options_of(2 * kMiB, 16, 3), profiles_);
    } catch (const Error& error) {
      GTEST_SKIP() << error.what();
    }
  }
  TunedOptions tuned(Device device = {}) const { return tuned_options(dir_.path(), device, profiles_); }
  std::string text() const {
    const auto bytes = read_file(profiles_);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  void rewrite(std::string_view text) const { write_file(profiles_, std::as_bytes(std::span(text))); }
  void edit(const char* pattern, const std::string& by) const {
    const std::string edited = std::regex_replace(text(), std::regex(pattern), by);
    ASSERT_NE(edited, text()) << pattern;
    rewrite(edited);
  }
  void expect_defaults(std::string_view why, Device device = {}) const {
    const TunedOptions got = tuned(device);
    EXPECT_FALSE(got.applied);
    EXPECT_TRUE(has(got.reason, why)) << got.reason;
    EXPECT_EQ(got.options.chunk_bytes, EngineOptions().chunk_bytes);
    EXPECT_EQ(got.options.queue_depth, EngineOptions().queue_depth);
    EXPECT_EQ(got.options.workers, EngineOptions().workers);
    EXPECT_EQ(got.options.staging_bytes, 0U);
    EXPECT_EQ(got.options.backend, EngineOptions().backend);
  }

  TempDir dir_;
  std::filesystem::path profiles_ = dir_ / "config/flashpack/tune.json";
};

}  // namespace flashpack::testing
