#include "engine/ground/error.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

namespace flashpack {
namespace {

TEST(ErrorTest, SaysOperationPathRangeAndCause) {
  const Error error = internal::range_error(internal::errno_code(EIO), "read", "model.flashpack", 12288, 4194304);
  EXPECT_STREQ(error.what(), "read model.flashpack at 12288+4194304: Input/output error");
  EXPECT_EQ(error.path(), "model.flashpack");
  EXPECT_EQ(error.offset_bytes(), 12288u);
}

TEST(ErrorTest, OfAWholeFileHasNoOffset) {
  const Error error = internal::file_error(Errc::kTruncated, "read", "model.flashpack");
  EXPECT_STREQ(error.what(), "read model.flashpack: short read: the file ends before the requested bytes");
  EXPECT_EQ(error.offset_bytes(), Error::kNoOffset);
}

TEST(ErrorTest, OfAnArgumentHasAPathIfTheArgumentConcernsAFile) {
  EXPECT_TRUE(internal::argument_error("chunk_bytes").path().empty());
  const Error error = internal::argument_error("load", "model.flashpack", "extent without a target");
  EXPECT_STREQ(error.what(), "load model.flashpack: extent without a target: invalid argument");
  EXPECT_EQ(error.path(), "model.flashpack");
}

TEST(ErrorTest, CodesCompareWithErrcAndWithStdErrc) {
  EXPECT_EQ(internal::argument_error("chunk_bytes").code(), Errc::kInvalidArgument);
  EXPECT_EQ(internal::file_error(internal::errno_code(ENOENT), "open", "x").code(),
            std::errc::no_such_file_or_directory);
}

TEST(ErrorTest, OurCodesEqualTheirLikeInStdErrc) {
  EXPECT_EQ(make_error_code(Errc::kCancelled), std::errc::operation_canceled);
  EXPECT_EQ(make_error_code(Errc::kDeadlineExceeded), std::errc::timed_out);
  EXPECT_EQ(make_error_code(Errc::kInvalidArgument), std::errc::invalid_argument);
  EXPECT_NE(make_error_code(Errc::kTruncated), std::errc::timed_out);
  EXPECT_EQ(make_error_code(Errc::kCancelled), Errc::kCancelled);
}

TEST(ErrorTest, ACauseThatIsPassedOnIsNamedOnce) {
  const std::system_error with_a_call(ENODEV, std::generic_category(), "cudaSetDevice");
  EXPECT_STREQ(internal::operation_error("start engine", with_a_call).what(),
               "start engine: cudaSetDevice: No such device");
  const std::system_error bare(std::error_code(EAGAIN, std::generic_category()));
  EXPECT_STREQ(internal::operation_error("start engine", bare).what(),
               "start engine: Resource temporarily unavailable");
}

TEST(ErrorTest, EveryErrcHasAMessageOfItsOwn) {
  std::set<std::string> messages = {flashpack_category().message(0)};
  constexpr int kLast = static_cast<int>(Errc::kCorrupt);
  for (int value = 1; value <= kLast; ++value) messages.insert(flashpack_category().message(value));
  EXPECT_EQ(messages.size(), kLast + 1u);
}

}  // namespace
}  // namespace flashpack
