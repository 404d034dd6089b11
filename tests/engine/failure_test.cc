#include "engine/failure.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>

namespace flashpack::internal {
namespace {

TEST(FailureTest, EveryExceptionHasACodeAndAPath) {
  const auto failure_of = [](auto thrown) {
    try {
      throw thrown;
    } catch (...) {
      return Failure::of_exception("open", "the file");
    }
  };
  const Failure own = failure_of(Error(Errc::kTruncated, "read something", "another", 7));
  EXPECT_EQ(own.error().what(), std::string("read something: ") + make_error_code(Errc::kTruncated).message());
  EXPECT_EQ(own.path, "another");
  EXPECT_EQ(own.offset_bytes, 7u);
  const Failure system = failure_of(std::system_error(EDEADLK, std::generic_category()));
  EXPECT_EQ(system.code, std::errc::resource_deadlock_would_occur);
  EXPECT_EQ(system.path, "the file");
  EXPECT_EQ(failure_of(std::bad_alloc()).code, std::errc::not_enough_memory);
  EXPECT_EQ(failure_of(std::length_error("vector")).code, std::errc::not_enough_memory);
  const Failure fault = failure_of(std::logic_error("an index"));
  EXPECT_EQ(fault.code, std::errc::state_not_recoverable);
  EXPECT_EQ(fault.context, "open the file: an index");
}

TEST(FailureTest, ItsErrorSaysTheSameAsTheOneThatItWasMadeOf) {
  const std::error_code code = Errc::kTruncated;
  const std::string with_zero = std::string("open a") + '\0' + "b, which no system call sees whole";
  for (const std::string& context : {std::string(), std::string("read a"), "read " + code.message(), with_zero}) {
    const Error error(code, context);
    EXPECT_EQ(Failure(error).context, context);
    EXPECT_STREQ(Failure(error).error().what(), error.what());
  }
}

TEST(FailureTest, ItsErrorHasThoseOfTheFiles) {
  Failure failure(Error(Errc::kTruncated, "read a", "a"));
  EXPECT_TRUE(failure.error().files().empty());
  failure.files = {{3, Failure(Error(Errc::kCorrupt, "verify b", "b", 7))}, {5, failure}};
  std::optional<Error> copy;
  {
    const Error error = failure.error();
    ASSERT_EQ(error.files().size(), 2u);
    copy = error;
  }
  ASSERT_EQ(copy->files().size(), 2u);
  EXPECT_EQ(copy->files()[0].file, 3u);
  EXPECT_EQ(copy->files()[0].error.code(), Errc::kCorrupt);
  EXPECT_EQ(copy->files()[0].error.path(), "b");
  EXPECT_EQ(copy->files()[0].error.offset_bytes(), 7u);
  EXPECT_EQ(copy->files()[1].file, 5u);
  EXPECT_EQ(copy->files()[1].error.what(), "read a: " + make_error_code(Errc::kTruncated).message());
}

}  // namespace
}  // namespace flashpack::internal
