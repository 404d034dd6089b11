#include "bench/support/page_cache.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <fstream>
#include <functional>
#include <string>

#include "tests/support/lies_in_memory.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"

namespace flashpack::bench {
namespace {

class PageCache : public ::testing::Test {
 protected:
  void SetUp() override {
    std::ofstream(path_) << std::string(kSizeBytes, 'x');
    if (testing::lies_in_memory(path_)) GTEST_SKIP() << "this file system keeps its pages";
    drop_from_page_cache(path_);
  }
  void TearDown() override { std::filesystem::remove(path_); }

  static constexpr std::size_t kSizeBytes = std::size_t{8} << 20;
  /// A kernel that is short of memory takes some pages back before they are counted.
  static constexpr double kIn = 0.9;
  /// It may take many, so that one time of several counts.
  static bool one_time_of_several(const std::function<bool()>& holds) {
    for (int time = 0; time < 20; ++time) {
      if (holds()) return true;
    }
    return false;
  }
  /// In the build tree: a tmpfs has no disk to be cold on.
  const std::filesystem::path path_ = "page_cache_test." + std::to_string(::getpid());
};

TEST_F(PageCache, ADroppedFileIsOutAndAWarmedOneIsIn) {
  EXPECT_EQ(resident_fraction(path_), 0);
  EXPECT_TRUE(can_stay_in_page_cache(path_));
  EXPECT_TRUE(one_time_of_several([&] {
    warm_page_cache(path_);
    return resident_fraction(path_) >= kIn;
  }));
  EXPECT_TRUE(try_drop_from_page_cache(path_));
  EXPECT_EQ(resident_fraction(path_), 0);
}

TEST_F(PageCache, AFileThatStaysIsToldApartFromOneOfWhichAPartStays) {
  {
    const testing::HeldInCache all(path_);
    if (!all.locked()) GTEST_SKIP() << "so many pages cannot be locked";
    EXPECT_FALSE(try_drop_from_page_cache(path_));
    EXPECT_THROW(drop_from_page_cache(path_), PageCacheError);
  }
  const testing::HeldInCache half(path_, kSizeBytes / 2);
  EXPECT_THROW(try_drop_from_page_cache(path_), PageCacheError);
}

TEST_F(PageCache, WithoutCachestatTheSameIsTold) {
  constexpr unsigned kSysCachestat = 451;
  constexpr std::uint64_t kHalfBytes = kSizeBytes / 2;
  int status = 1;
  one_time_of_several([&] {
    warm_every_other(path_, kHalfBytes);
    status = testing::run_in_child([&] {
      if (!testing::deny_syscall(kSysCachestat, ENOSYS)) return testing::kSkip;
      const bool halves = resident_fraction(path_, 0, kHalfBytes) >= kIn && resident_fraction(path_, kHalfBytes) == 0;
      const double whole = resident_fraction(path_);
      return halves && whole >= kIn / 2 && whole <= 0.5 && try_drop_from_page_cache(path_) ? 0 : 1;
    });
    return status == 0 || status == testing::kSkip;
  });
  if (status == testing::kSkip) GTEST_SKIP() << "no seccomp";
  EXPECT_EQ(status, 0);
}

TEST_F(PageCache, EveryOtherStripeIsInAndTheRestIsOut) {
  constexpr std::uint64_t kStripeBytes = 2u << 20;
  EXPECT_TRUE(one_time_of_several([&] {
    warm_every_other(path_, kStripeBytes);
    std::array<double, 4> in{};
    for (std::size_t stripe = 0; stripe < in.size(); ++stripe)
      in[stripe] = resident_fraction(path_, stripe * kStripeBytes, kStripeBytes);
    return in[0] >= kIn && in[1] == 0 && in[2] >= kIn && in[3] == 0;
  }));
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
