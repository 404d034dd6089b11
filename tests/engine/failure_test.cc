#include "engine/failure.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <new>
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

}  // namespace
}  // namespace flashpack::internal
