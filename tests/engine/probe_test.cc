#include "flashpack/probe.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <algorithm>
#include <set>

#include "flashpack/error.h"
#include "tests/support/sandbox.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

using testing::kSkip;
using testing::run_in_child;

Finding find(const std::vector<Finding>& findings, const std::string& key) {
  const auto found = std::find_if(findings.begin(), findings.end(), [&](const auto& f) { return f.key == key; });
  return found == findings.end() ? Finding{.value = "missing"} : *found;
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

TEST(ProbeTest, EveryFindingHasAKeyOfItsOwnAndAValueAndEveryLimitACure) {
  const testing::TempDir dir;
  testing::write_file(dir / "file", testing::random_bytes(9000));
  for (const auto& path : {std::filesystem::path(), dir.path(), dir / "file"}) {
    std::set<std::string> keys;
    for (const Finding& finding : probe(path)) {
      EXPECT_TRUE(keys.insert(finding.key).second) << finding.key;
      EXPECT_NE(finding.value, "") << finding.key;
      EXPECT_EQ(finding.limit.empty(), finding.cure.empty()) << finding.key;
    }
    for (const char* key : {"kernel", "cpus", "seccomp", "io_uring", "registered_buffers", "locked_memory",
                            "huge_pages", "numa", "gpus"}) {
      EXPECT_TRUE(keys.contains(key)) << key;
    }
    for (const char* key : {"file_system", "direct_io", "residency"}) {
      EXPECT_EQ(keys.contains(key), !path.empty()) << key;
    }
  }
}

TEST(ProbeTest, ADirectoryIsLeftAsItWas) {
  const testing::TempDir dir;
  probe(dir.path());
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(ProbeTest, WhatIsNotThereIsAnErrorWithItsPath) {
  const testing::TempDir dir;
  try {
    probe(dir / "none");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), std::errc::no_such_file_or_directory);
    EXPECT_EQ(error.path(), dir / "none");
  }
}

TEST(ProbeTest, AFilterThatRefusesIoUringIsNamedWithItsCure) {
  const int status = run_in_child([] {
    if (!testing::deny_syscall(SYS_io_uring_setup, EPERM)) return kSkip;
    const auto findings = probe();
    const Finding ring = find(findings, "io_uring");
    if (ring.value != "refused" || !has(ring.limit, "Operation not permitted")) return 1;
    if (find(findings, "seccomp").value != "a filter is in place") return 2;
    return has(ring.cure, "seccomp") || has(ring.cure, "io_uring_disabled=0") ? 0 : 3;
  });
  if (status == kSkip) GTEST_SKIP() << "seccomp filters are not allowed here";
  EXPECT_EQ(status, 0);
}

TEST(ProbeTest, TooLittleLockableMemoryIsNamedWithItsCure) {
  const int status = run_in_child([] {
    if (!testing::drop_lockable_memory()) return kSkip;
    const auto findings = probe();
    if (find(findings, "io_uring").value == "refused") return kSkip;
    const Finding buffers = find(findings, "registered_buffers");
    if (find(findings, "locked_memory").value != "64 KiB") return 1;
    return buffers.value == "no" && has(buffers.cure, "ulimit -l") ? 0 : 2;
  });
  if (status == kSkip) GTEST_SKIP() << "the capability cannot be dropped, or there is no io_uring";
  EXPECT_EQ(status, 0);
}

TEST(ProbeTest, WithoutCachestatSinglePagesAreFound) {
  const testing::TempDir dir;
  testing::write_file(dir / "file", testing::random_bytes(9000));
  const int status = run_in_child([&] {
    constexpr unsigned kSysCachestat = 451;
    if (!testing::deny_syscall(kSysCachestat, EPERM)) return kSkip;
    const Finding residency = find(probe(dir / "file"), "residency");
    return residency.value != "cachestat" && has(residency.limit, "cachestat") && !residency.cure.empty() ? 0 : 1;
  });
  if (status == kSkip) GTEST_SKIP() << "seccomp filters are not allowed here";
  EXPECT_EQ(status, 0);
}

TEST(ProbeTest, AFileSystemIsCalledByItsName) {
  EXPECT_EQ(find(probe("/proc/self/status"), "file_system").value, "proc");
  const Finding direct = find(probe("/proc/self/status"), "direct_io");
  EXPECT_EQ(direct.value, "no");
  EXPECT_NE(direct.cure, "");
}

}  // namespace
}  // namespace flashpack
