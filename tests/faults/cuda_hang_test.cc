// A file system that does not answer leaves slots of a device's engine to the loads of others, although no slot is
// spare.
#include <gtest/gtest.h>

#include <chrono>
#include <list>
#include <memory>
#include <thread>

#include "tests/support/device_test.h"
#include "tests/support/hanging_fs.h"

namespace flashpack {
namespace {

using testing::cuda;
using testing::kHang;
using testing::kMiB;

class CudaHangTest : public testing::DeviceTest {
 protected:
  static constexpr std::uint32_t kSlots = 8;

  void SetUp() override {
    fs_ = std::make_unique<testing::HangingFs>(FLASHPACK_HANGING_FS, dir_ / "a mount");
    if (!fs_->mounted()) GTEST_SKIP() << "FUSE cannot be mounted here";
    testing::write_file(*fs_ / "stuck", bytes_);
    // The queue has room for as many reads as there are slots, so that nothing but the rule about slots leaves any.
    EngineOptions options = this->options();
    options.queue_depth = kSlots;
    options.staging_bytes = kSlots * kMiB;
    engine_.reset();
    engine_.emplace(options);
  }

  Transfer& start_load_that_hangs() {
    LoadRequest wanted = request(target_);
    wanted.files.front().path = *fs_ / "stuck";
    fs_->hold("read", "stuck");
    return stuck_.emplace_back(engine_->start_load(wanted));
  }

  // Whether the driver has given the load all slots that it gets for now.
  static bool wait_until_it_has_its_slots(const Transfer& load) {
    const Deadline deadline = std::chrono::steady_clock::now() + kHang;
    while (load.progress().outstanding < kSlots * 3 / 4) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }

  void expect_that_another_load_lands() {
    cuda().poison(other_target_, bytes_.size());
    Transfer other = engine_->start_load(request(other_target_));
    ASSERT_TRUE(other.wait_for(kHang)) << "it finds no slot";
    EXPECT_EQ(other.error(), std::error_code());
    EXPECT_TRUE(right(other_target_));
  }

  std::byte* const target_ = cuda().allocate(bytes_.size());
  std::byte* const other_target_ = cuda().allocate(bytes_.size());
  std::list<Transfer> stuck_;
  // Ends before the loads and the engine, and lets go of everything.
  std::unique_ptr<testing::HangingFs> fs_;
};

INSTANTIATE_TEST_SUITE_P(Backends, CudaHangTest, testing::kBackends, testing::backend_name);

TEST_P(CudaHangTest, ReadsThatHangLeaveSlotsToLoadsOfOtherFileSystemsAndLandWhenTheyAreAnswered) {
  Transfer& stuck = start_load_that_hangs();
  ASSERT_TRUE(wait_until_it_has_its_slots(stuck));
  ASSERT_TRUE(fs_->wait_until_held("read", "stuck"));
  // Until the reads are late, which makes room in the queue for more of the same file, and longer.
  const Deadline enough = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  while (std::chrono::steady_clock::now() < enough && !HasFatalFailure()) expect_that_another_load_lands();
  EXPECT_FALSE(stuck.progress().finished);
  fs_->release();
  ASSERT_TRUE(stuck.wait_for(kHang));
  EXPECT_EQ(stuck.error(), std::error_code());
  EXPECT_TRUE(right(target_));
}

TEST_P(CudaHangTest, CancelledReadsThatHangLeaveSlotsToFurtherLoadsOfOtherFileSystems) {
  Transfer& stuck = start_load_that_hangs();
  ASSERT_TRUE(wait_until_it_has_its_slots(stuck));
  stuck.cancel();
  expect_that_another_load_lands();
  // A further load of the file system finds no more slots than the first one has left.
  Transfer& again = start_load_that_hangs();
  const Deadline enough = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  while (std::chrono::steady_clock::now() < enough && !HasFatalFailure()) expect_that_another_load_lands();
  again.cancel();
  fs_->release();
  for (Transfer& load : stuck_) {
    ASSERT_TRUE(load.wait_for(kHang));
    EXPECT_EQ(load.error(), Errc::kCancelled);
  }
}

}  // namespace
}  // namespace flashpack
