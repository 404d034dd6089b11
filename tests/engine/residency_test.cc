#include "engine/residency.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <functional>
#include <optional>

#include "engine/unique_fd.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"

namespace flashpack::engine {
namespace {

using Method = Residency::Method;

constexpr std::uint64_t kMiB = 1u << 20;
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

  unsigned cached_chunks() {
    Residency residency(fd_.get());
    unsigned count = 0;
    for (std::uint64_t at = 0; at < 8 * kMiB; at += kMiB) count += residency.cached(at, kMiB);
    return count;
  }

  flashpack::testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "file";
  std::optional<flashpack::testing::HeldInCache> held_;
  UniqueFd fd_;
};

TEST_F(ResidencyTest, FollowsThePageCache) {
  Residency residency(fd_.get());
  warm();
  const bool hot = residency.cached(0, 8 * kMiB);
  if (residency.method() != Method::kCachestat) GTEST_SKIP() << residency.fallback_reason();
  EXPECT_TRUE(hot);
  EXPECT_EQ(residency.fallback_reason(), "");
  cool();
  EXPECT_FALSE(residency.cached(0, kMiB));
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
    const bool hot = residency.cached(0, 8 * kMiB);
    if (residency.method() != Method::kProbe) return 2;
    return hot && residency.fallback_reason().find("Operation not permitted") != std::string::npos ? 0 : 1;
  });
  if (status == 2) GTEST_SKIP() << "no seccomp, or a file system without RWF_NOWAIT";
  EXPECT_EQ(status, 0);
}

TEST_F(ResidencyTest, AskingAboutAColdFileDoesNotMakeItLookCachedTheNextTime) {
  cool();
  const int status = ask_without_cachestat([&] {
    unsigned wrong = 0;
    for (int load = 0; load < 10; ++load) wrong += cached_chunks();
    return wrong <= 20 ? 0 : 1;  // By chance about 1; asked in a fixed place, 72 of 80 would be wrong.
  });
  if (status == 2) GTEST_SKIP() << "no seccomp";
  EXPECT_EQ(status, 0);
}

TEST_F(ResidencyTest, WhatWasWrongTooOftenIsNotBelievedAnyMore) {
  warm();
  Residency residency(fd_.get());
  if (!residency.cached(0, kMiB)) GTEST_SKIP() << residency.fallback_reason();
  residency.report_wrong();
  EXPECT_TRUE(residency.cached(0, kMiB)) << "once may be chance";
  for (int i = 0; i < 3; ++i) residency.report_wrong();
  EXPECT_FALSE(residency.cached(0, kMiB));
  EXPECT_NE(residency.fallback_reason(), "");
}

}  // namespace
}  // namespace flashpack::engine
