// These tests do the same for extents on a device, whose bytes have landed only when their copies have ended.
#include <gtest/gtest.h>

#include <atomic>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "tests/support/device_test.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/wait_until.h"

namespace flashpack {
namespace {

using testing::cuda;
using testing::kHang;
using testing::kMiB;

class CudaLandingTest : public testing::DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Backends, CudaLandingTest, testing::kBackends, testing::backend_name);

// Looks at the bytes as soon as it is told of them.
struct Looks final : Completion {
  explicit Looks(std::function<bool(std::size_t)> look) : is_right(std::move(look)) {}
  void landed(std::size_t, std::size_t extent) noexcept override {
    EXPECT_TRUE(is_right(extent)) << "extent " << extent;
    ++count;
  }
  void done(Transfer&) noexcept override {}
  std::function<bool(std::size_t)> is_right;
  std::atomic<std::size_t> count = 0;
};

TEST_P(CudaLandingTest, AnExtentIsToldWhenTheDeviceHasItsBytes) {
  std::byte* const target = cuda().allocate(bytes_.size());
  testing::GuardedMemory on_host(kMiB);
  FileExtents file{.path = path_};
  for (std::uint64_t at = 0; at + 700'000 <= bytes_.size() - kMiB; at += 700'000)
    file.extents.push_back({at, 700'000, target + at});
  file.extents.push_back({bytes_.size() - kMiB, kMiB, on_host.data()});
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    cuda().poison(target, bytes_.size());
    Looks looks([&](std::size_t index) {
      const Extent& extent = file.extents.at(index);
      const auto bytes = std::span(bytes_).subspan(extent.offset_bytes, extent.size_bytes);
      if (extent.target == on_host.data()) return std::ranges::equal(bytes, std::span(on_host.data(), kMiB));
      return cuda().holds(static_cast<std::byte*>(extent.target), bytes);
    });
    cuda().hold(true);
    Transfer transfer = engine_->start_load({.files = {file}, .cache = cache, .report_extents = true}, &looks);
    testing::wait_until([&] { return cuda().copies_under_way(1) >= 8; });
    EXPECT_LE(looks.count, 1u) << "only the one on the host";
    cuda().hold(false);
    ASSERT_TRUE(transfer.wait_for(kHang));
    EXPECT_FALSE(transfer.error()) << transfer.error_text();
    EXPECT_EQ(looks.count, file.extents.size());
  }
}

TEST_P(CudaLandingTest, AfterAnErrorOfTheDeviceNothingIsToldThatItHasNot) {
  std::byte* const target = cuda().allocate(bytes_.size());
  FileExtents file{.path = path_};
  for (std::uint64_t at = 0; at + kMiB <= bytes_.size(); at += kMiB) file.extents.push_back({at, kMiB, target + at});
  Looks looks([&](std::size_t index) {
    return cuda().holds(target + index * kMiB, std::span(bytes_).subspan(index * kMiB, kMiB));
  });
  cuda().fail("cudaMemcpyAsync", 6, cudaErrorInvalidValue);
  Transfer transfer =
      engine_->start_load({.files = {file}, .cache = CachePolicy::kDirect, .report_extents = true}, &looks);
  ASSERT_TRUE(transfer.wait_for(kHang));
  EXPECT_TRUE(transfer.error());
  EXPECT_LT(looks.count, file.extents.size());
}

TEST_P(CudaLandingTest, AFileThatFailsLeavesTheCopiesOfTheOthersAlone) {
  std::byte* const target = cuda().allocate(bytes_.size());
  std::byte* const of_failed = cuda().allocate(bytes_.size());
  LoadRequest wanted{.cache = CachePolicy::kDirect, .continue_on_error = true};
  wanted.files.push_back(request(of_failed).files.front());
  wanted.files.push_back(request(target).files.front());
  Checksums wrong{.size_bytes = bytes_.size()};
  wrong.crc32c.resize(Checksums::stripes_in(bytes_.size()));
  wanted.files[0].checksums = &wrong;
  for (const bool reported : {false, true}) {  // If reported, it fails while copies of it are under way.
    cuda().poison(target, bytes_.size());
    wanted.report_extents = reported;
    Looks looks([](std::size_t) { return true; });
    Transfer transfer = engine_->start_load(wanted, &looks);
    ASSERT_TRUE(transfer.wait_for(kHang));
    ASSERT_EQ(transfer.file_errors().size(), 1u) << transfer.error_text();
    EXPECT_EQ(transfer.file_errors().front().file, 0u);
    EXPECT_EQ(transfer.error(), Errc::kCorrupt);
    EXPECT_TRUE(right(target));
    EXPECT_EQ(looks.count, reported ? 1u : 0u);
  }
}

TEST_P(CudaLandingTest, AnErrorOfTheDeviceFailsAllFilesThatHaveNotLanded) {
  std::byte* const first = cuda().allocate(bytes_.size());
  std::byte* const second = cuda().allocate(bytes_.size());
  LoadRequest wanted{.cache = CachePolicy::kDirect, .continue_on_error = true};
  wanted.files.push_back({.path = dir_ / "none", .extents = {{0, 0, nullptr}}, .fd = std::numeric_limits<int>::max()});
  wanted.files.push_back(request(first).files.front());
  wanted.files.push_back(request(second).files.front());
  cuda().hold(true);
  cuda().fail("cudaMemcpyAsync", 6, cudaErrorInvalidValue);
  Transfer transfer = engine_->start_load(wanted);
  testing::wait_until([&] { return !cuda().failure_pending(); });
  cuda().hold(false);
  ASSERT_TRUE(transfer.wait_for(kHang));
  EXPECT_EQ(transfer.error().category(), cuda_category());
  const std::vector<FileError> errors = transfer.file_errors();
  ASSERT_EQ(errors.size(), 3u);
  EXPECT_EQ(errors[0].error.code(), std::errc::bad_file_descriptor);
  EXPECT_EQ(errors[1].error.code(), transfer.error());
  EXPECT_EQ(errors[2].error.code(), transfer.error());
}

}  // namespace
}  // namespace flashpack
