#include "bench/support/page_cache.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <string>

#include "tests/support/sandbox.h"

namespace flashpack::bench {
namespace {

class PageCache : public ::testing::Test {
 protected:
  void SetUp() override {
    std::ofstream(path_) << std::string(std::size_t{8} << 20, 'x');
    try {
      drop_from_page_cache(path_);
    } catch (const std::system_error&) {
      throw;
    } catch (const std::runtime_error& error) {
      GTEST_SKIP() << "this file system keeps its pages: " << error.what();
    }
  }
  void TearDown() override { std::filesystem::remove(path_); }

  /// In the build tree: a tmpfs has no disk to be cold on.
  const std::filesystem::path path_ = "page_cache_test." + std::to_string(::getpid());
};

TEST_F(PageCache, ADroppedFileIsOutAndAWarmedOneIsIn) {
  EXPECT_EQ(resident_fraction(path_), 0);
  EXPECT_TRUE(can_stay_in_page_cache(path_));
  warm_page_cache(path_);
  EXPECT_EQ(resident_fraction(path_), 1);
}

TEST_F(PageCache, WithoutCachestatTheSameIsTold) {
  constexpr unsigned kSysCachestat = 451;
  constexpr std::uint64_t kHalfBytes = 4u << 20;
  warm_every_other(path_, kHalfBytes);
  const int status = testing::run_in_child([&] {
    if (!testing::deny_syscall(kSysCachestat, ENOSYS)) return testing::kSkip;
    const bool halves = resident_fraction(path_, 0, kHalfBytes) == 1 && resident_fraction(path_, kHalfBytes) == 0;
    return halves && resident_fraction(path_) == 0.5 && try_drop_from_page_cache(path_) ? 0 : 1;
  });
  if (status == testing::kSkip) GTEST_SKIP() << "no seccomp";
  EXPECT_EQ(status, 0);
}

TEST_F(PageCache, EveryOtherStripeIsInAndTheRestIsOut) {
  constexpr std::uint64_t kStripeBytes = 2u << 20;
  warm_every_other(path_, kStripeBytes);
  for (const std::uint64_t stripe : {0u, 1u, 2u, 3u}) {
    EXPECT_EQ(resident_fraction(path_, stripe * kStripeBytes, kStripeBytes), stripe % 2 == 0 ? 1 : 0);
  }
}

TEST_F(PageCache, AMissingFileIsNamed) {
  try {
    resident_fraction("no/such/file");
    FAIL();
  } catch (const std::system_error& error) {
    EXPECT_NE(std::string(error.what()).find("open no/such/file"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace flashpack::bench
