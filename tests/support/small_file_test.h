#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>

#include <vector>

#include "engine/ground/unique_fd.h"
#include "tests/support/temp_dir.h"

namespace flashpack::testing {

/// Has a file of random bytes that is open for reading and writing.
class SmallFileTest : public ::testing::Test {
 protected:
  SmallFileTest() {
    write_file(dir_ / "file", bytes_);
    fd_.reset(::open((dir_ / "file").c_str(), O_RDWR | O_CLOEXEC));
  }

  TempDir dir_;
  std::vector<std::byte> bytes_ = random_bytes(300'000);
  internal::UniqueFd fd_;
};

}  // namespace flashpack::testing
