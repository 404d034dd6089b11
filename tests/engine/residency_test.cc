#include "engine/residency.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <functional>
#include <optional>

#include "engine/ground/unique_fd.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack::internal {
namespace {

using testing::kMiB;

using Method = Residency::Method;

constexpr unsigned kSysCachestat = 451;

class ResidencyTest : public ::testing::Test {
 protected:
  ResidencyTest() {
    flashpack::testing::write_file(path_, flashpack::testing::random_bytes(8 * kMiB));
    fd_.reset(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
  }

  void warm() { held_.emplace(path_); }
  void cool() {
    held_.reset();
    flashpack::testing::drop_from_cache(path_);
  }

  // Those that are being read are counted, too. None where the kernel has no cachestat.
  std::optional<std::uint64_t> pages_in_cache() const {
    const std::array<std::uint64_t, 2> range{0, 8 * kMiB};
    std::array<std::uint64_t, 5> counts{};  // Cached, dirty, in writeback, evicted, recently evicted.
    if (::syscall(kSysCachestat, fd_.get(), range.data(), counts.data(), 0) != 0) return std::nullopt;
    return counts[0];
  }

  flashpack::testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "file";
  std::optional<flashpack::testing::HeldInCache> held_;
  UniqueFd fd_;
};

TEST_F(ResidencyTest, FollowsThePageCache) {
  Residency residency(fd_.get());
  warm();
  const bool hot = residency.seems_cached(0, 8 * kMiB);
  if (residency.method() != Method::kCachestat) GTEST_SKIP() << residency.fallback_reason();
  EXPECT_TRUE(hot);
  EXPECT_EQ(residency.fallback_reason(), "");
  cool();
  EXPECT_FALSE(residency.seems_cached(0, kMiB));
}

// 0 is right, 1 wrong, 2 that it cannot be tried here.
int ask_without_cachestat(const std::function<int()>& body) {
  return flashpack::testing::run_in_child([&] {
    if (!flashpack::testing::deny_syscall(kSysCachestat, EPERM)) return 2;
    return body();
  });
}

TEST_F(ResidencyTest, WithoutCachestatSinglePagesAnswer) {
  warm();
  const int status = ask_without_cachestat([&] {
    Residency residency(fd_.get());
    const bool hot = residency.seems_cached(0, 8 * kMiB);
    if (residency.method() != Method::kProbe) return 2;
    return hot && residency.fallback_reason().find("Operation not permitted") != std::string::npos ? 0 : 1;
  });
  if (status == 2) GTEST_SKIP() << "no seccomp, or a file system without RWF_NOWAIT";
  EXPECT_EQ(status, 0);
}

// A page that is asked for is read, and may even be there in time for the answer, so it is not the answers that are
// counted. Asked about in a fixed place, a file would look cached from the second load on.
TEST_F(ResidencyTest, AskingAboutAColdFileBringsInASinglePageEachTimeInAnotherPlace) {
  cool();
  const auto before = pages_in_cache();
  if (!before) GTEST_SKIP() << "no cachestat";
  constexpr unsigned kLoads = 10;
  const int status = ask_without_cachestat([&] {
    for (unsigned load = 0; load < kLoads; ++load) {
      Residency residency(fd_.get());
      for (std::uint64_t at = 0; at < 8 * kMiB; at += kMiB) residency.seems_cached(at, kMiB);
    }
    return 0;
  });
  if (status == 2) GTEST_SKIP() << "no seccomp";
  const std::uint64_t after = *pages_in_cache();
  EXPECT_LE(after, *before + kLoads * 8);
  // Under pressure the kernel may have taken pages back meanwhile. A fixed place would bring in 8.
  EXPECT_GT(after, *before + 8) << "the places of all loads are the same";
}

TEST_F(ResidencyTest, WhatWasWrongTooOftenIsNotBelievedAnyMore) {
  warm();
  Residency residency(fd_.get());
  if (!residency.seems_cached(0, kMiB)) GTEST_SKIP() << residency.fallback_reason();
  residency.report_wrong();
  EXPECT_TRUE(residency.seems_cached(0, kMiB)) << "once may be chance";
  for (int i = 0; i < 3; ++i) residency.report_wrong();
  EXPECT_FALSE(residency.seems_cached(0, kMiB));
  EXPECT_NE(residency.fallback_reason(), "");
}

}  // namespace
}  // namespace flashpack::internal
