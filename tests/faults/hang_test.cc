// A file system that does not answer holds up its own transfers and nothing else.
#include <gtest/gtest.h>

#include <cstring>
#include <future>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hanging_fs.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

using testing::GuardedMemory;

constexpr std::uint32_t kMiB = 1u << 20;
constexpr std::chrono::seconds kHang{20};
constexpr std::uint32_t kDepth = 8;
constexpr std::uint32_t kWorkers = 2;

class HangTest : public ::testing::TestWithParam<Backend> {
 protected:
  struct Load {
    std::unique_ptr<GuardedMemory> memory;
    std::optional<Transfer> transfer;
  };

  void SetUp() override {
    fs_ = std::make_unique<testing::HangingFs>(FLASHPACK_HANGING_FS, dir_ / "fuse");
    if (!fs_->mounted()) GTEST_SKIP() << "FUSE cannot be mounted here";
    testing::write_file(*fs_ / "stuck", bytes_);
    testing::write_file(dir_ / "other", bytes_);
  }

  static LoadRequest request(const std::filesystem::path& path, GuardedMemory& memory,
                             CachePolicy policy = CachePolicy::kDirect) {
    return {.files = {{.path = path, .extents = {{0, memory.size(), memory.data()}}}}, .cache = policy};
  }

  // At `phase` 0 it is read in place, at 64 through slots.
  Load& start(const std::filesystem::path& path, std::size_t phase, std::optional<Deadline> deadline = {}) {
    Load& load = loads_.emplace_back();
    load.memory = std::make_unique<GuardedMemory>(bytes_.size(), phase);
    LoadRequest wanted = request(path, *load.memory);
    wanted.deadline = deadline;
    load.transfer = engine_->start_load(wanted);
    return load;
  }

  bool right(const Load& load) const {
    return load.memory->intact() && std::memcmp(load.memory->data(), bytes_.data(), bytes_.size()) == 0;
  }

  // How it has ended; a test that waits in vain goes on.
  static std::error_code outcome(Load& load) {
    if (!load.transfer->wait_for(kHang)) return std::make_error_code(std::errc::timed_out);
    try {
      load.transfer->wait();
      return {};
    } catch (const Error& error) {
      return error.code();
    }
  }

  // Other loads are whole, and deadlines are kept.
  void expect_that_others_go_on() {
    for (const std::size_t phase : {0u, 64u}) {
      Load& other = start(dir_ / "other", phase);
      ASSERT_EQ(outcome(other), std::error_code()) << phase;
      EXPECT_TRUE(right(other)) << phase;
      Load& late = start(dir_ / "other", phase, std::chrono::steady_clock::now());
      ASSERT_EQ(outcome(late), Errc::kDeadlineExceeded) << phase;
    }
  }

  // Cancelled loads, each with all the reads under way that the engine issues.
  void leave_stuck_loads(int count, std::size_t phase) {
    fs_->hold("read", "stuck");
    for (int i = 0; i < count; ++i) {
      Load& load = start(*fs_ / "stuck", phase);
      ASSERT_TRUE(fs_->wait_until_held("read", "stuck", GetParam() == Backend::kWorkers ? 1 : kDepth));
      load.transfer->cancel();
    }
  }

  testing::TempDir dir_;
  const std::vector<std::byte> bytes_ = testing::random_bytes(2 * kDepth * kMiB);
  // Ends after the file system, which lets go of everything.
  std::unique_ptr<Engine> engine_ = std::make_unique<Engine>(EngineOptions{.chunk_bytes = kMiB,
                                                                           .queue_depth = kDepth,
                                                                           .staging_bytes = 2 * kDepth * kMiB,
                                                                           .workers = kWorkers,
                                                                           .backend = GetParam()});
  std::list<Load> loads_;
  std::unique_ptr<testing::HangingFs> fs_;
};

std::string name_of(const ::testing::TestParamInfo<Backend>& backend) {
  return backend.param == Backend::kAuto ? "Auto" : "Workers";
}

INSTANTIATE_TEST_SUITE_P(Backends, HangTest, ::testing::Values(Backend::kAuto, Backend::kWorkers), name_of);

TEST_P(HangTest, AFileThatHangsWhenItIsOpenedHoldsUpNoOtherLoad) {
  for (const char* op : {"lookup", "open", "getattr"}) {
    fs_->hold(op, "stuck");
    GuardedMemory memory(bytes_.size());
    auto loaded = std::async(std::launch::async, [&] { engine_->load(request(*fs_ / "stuck", memory)); });
    if (!fs_->wait_until_held(op, "stuck")) ADD_FAILURE() << op;
    SCOPED_TRACE(op);
    expect_that_others_go_on();
    fs_->release();
    EXPECT_NO_THROW(loaded.get());
    EXPECT_EQ(std::memcmp(memory.data(), bytes_.data(), bytes_.size()), 0);
  }
}

TEST_P(HangTest, AnEngineWithReadsThatHangIsDestroyedWhenTheyAreAnswered) {
  leave_stuck_loads(1, 64);
  auto destroyed = std::async(std::launch::async, [this] { engine_.reset(); });
  fs_->release();
  EXPECT_EQ(destroyed.wait_for(kHang), std::future_status::ready);
  EXPECT_EQ(outcome(loads_.front()), Errc::kCancelled);
}

}  // namespace
}  // namespace flashpack
