// The API for programs without exceptions.
#include <gtest/gtest.h>

#include <optional>
#include <system_error>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/hang.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

class ErrorCodesTest : public ::testing::Test {
 protected:
  testing::TempDir dir_;
  std::vector<std::byte> bytes_ = testing::random_bytes(3 << 20);
  std::vector<std::byte> memory_ = std::vector<std::byte>(bytes_.size());
  std::error_code error_;
  std::optional<Engine> engine_ = Engine::make({.chunk_bytes = 1 << 20, .staging_bytes = 4 << 20}, error_);
};

TEST_F(ErrorCodesTest, AFileIsWrittenAndReadWithoutAnException) {
  ASSERT_TRUE(engine_ && !error_);
  std::optional<FileWriter> writer = engine_->create(dir_ / "file", {.checksums = true}, error_);
  ASSERT_TRUE(writer && !error_);
  Transfer write = writer->start_write({.extents = {{0, bytes_.size(), bytes_.data()}}}, nullptr, error_);
  ASSERT_TRUE(write.valid() && !error_);
  ASSERT_TRUE(write.wait_for(testing::kHang));
  EXPECT_FALSE(write.error());
  EXPECT_EQ(write.error_text(), "");
  EXPECT_EQ(writer->checksums(error_).size_bytes, bytes_.size());
  EXPECT_FALSE(error_);
  writer->commit({}, error_);
  EXPECT_FALSE(error_);
  LoadRequest request{.files = {{.path = dir_ / "file", .extents = {{0, memory_.size(), memory_.data()}}}}};
  Transfer load = engine_->start_load(request, nullptr, error_);
  ASSERT_TRUE(load.valid() && load.wait_for(testing::kHang));
  EXPECT_FALSE(load.error());
  EXPECT_EQ(memory_, bytes_);
}

TEST_F(ErrorCodesTest, EachFailureHasACode) {
  EXPECT_FALSE(Engine::make({.queue_depth = 0}, error_));
  EXPECT_EQ(error_, Errc::kInvalidArgument);
  Transfer missing = engine_->start_load({.files = {{.path = dir_ / "none"}}}, nullptr, error_);
  ASSERT_TRUE(missing.valid() && missing.wait_for(testing::kHang));
  EXPECT_FALSE(error_);
  EXPECT_EQ(missing.error(), std::errc::no_such_file_or_directory);
  EXPECT_EQ(missing.error_text(), "open " + (dir_ / "none").string() + ": No such file or directory");
  EXPECT_FALSE(engine_->start_load({.files = {{.extents = {{0, 5, nullptr}}}}}, nullptr, error_).valid());
  EXPECT_EQ(error_, Errc::kInvalidArgument);
  EXPECT_FALSE(engine_->create(dir_ / "none" / "file", {}, error_));
  EXPECT_EQ(error_, std::errc::no_such_file_or_directory);
  std::optional<FileWriter> writer = engine_->create(dir_ / "file", {}, error_);
  EXPECT_FALSE(writer->start_write({.extents = {{0, 5, nullptr}}}, nullptr, error_).valid());
  EXPECT_EQ(error_, Errc::kInvalidArgument);
  writer->checksums(error_);
  EXPECT_EQ(error_, Errc::kInvalidArgument) << "none were asked for";
  writer->commit({}, error_);
  EXPECT_FALSE(error_);
  writer->commit({}, error_);
  EXPECT_EQ(error_, Errc::kInvalidArgument);
}

}  // namespace
}  // namespace flashpack
