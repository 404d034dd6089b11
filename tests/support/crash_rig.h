#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/sandbox.h"
#include "tests/support/small_loads.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack::testing {

/// What a child ends with, beside 0: it has saved.
constexpr int kNotReached = 76;  ///< There are fewer calls than that.
constexpr int kOldKept = 78;     ///< An error that names path and cause.
constexpr int kInPlace = 79;     ///< The same, and it says that the new file is in place.
constexpr int kOtherError = 80;

inline std::vector<std::byte> payload_of(unsigned version) {
  return random_bytes(2 * kMiB + 4096 * version + 777, version);
}

inline std::vector<std::byte> tail_of(unsigned version) { return random_bytes(100 + version, ~version); }

inline std::vector<std::byte> file_of(unsigned version) {
  auto file = payload_of(version);
  const auto tail = tail_of(version);
  file.insert(file.end(), tail.begin(), tail.end());
  return file;
}

inline void save(Engine& engine, const std::filesystem::path& path, unsigned version) {
  const auto payload = payload_of(version);
  const std::uint64_t half = kMiB + 4096 + 99;
  FileWriter writer = engine.create(path, {.payload_bytes = payload.size()});
  Transfer first = writer.start_write({.extents = {{.offset_bytes = 0, .size_bytes = half, .source = payload.data()}}});
  writer.write(
      {.extents = {{.offset_bytes = half, .size_bytes = payload.size() - half, .source = payload.data() + half}}});
  first.wait();
  writer.commit(tail_of(version));
}

inline int outcome_of_save(Engine& engine, const std::filesystem::path& path, unsigned version, int error_number) {
  try {
    save(engine, path, version);
    return 0;
  } catch (const Error& error) {
    const std::string what = error.what();
    const bool complete = error.code() == std::error_code(error_number, std::generic_category()) &&
                          error.path() == path && what.find(path.string()) != std::string::npos &&
                          what.find(std::strerror(error_number)) != std::string::npos;
    if (!complete) {
      std::fprintf(stderr, "%s\n", error.what());
      return kOtherError;
    }
    return what.find("in place, but perhaps not durable") == std::string::npos ? kOldKept : kInPlace;
  }
}

/// A file in version 1, and children that save others over it.
class CrashTest : public ::testing::Test {
 protected:
  void SetUp() override { write_file(path_, file_of(1)); }

  // None: neither of them, as a whole.
  std::optional<unsigned> version() const {
    const auto bytes = read_file(path_);
    for (const unsigned version : {1u, 2u, 3u}) {
      if (bytes == file_of(version)) return version;
    }
    return std::nullopt;
  }

  std::size_t entries() const {
    return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(dir_.path()), {}));
  }

  int save_in_child(unsigned version) const {
    return run_in_child([&] {
      Engine engine(small_engine());
      return outcome_of_save(engine, path_, version, 0);
    });
  }

  void expect_that_the_next_run_leaves_nothing_but_its_file() const {
    EXPECT_EQ(save_in_child(3), 0);
    EXPECT_EQ(version(), 3u);
    EXPECT_EQ(entries(), 1u);
  }

  TempDir dir_;
  std::filesystem::path path_ = dir_ / "model";
};

}  // namespace flashpack::testing
