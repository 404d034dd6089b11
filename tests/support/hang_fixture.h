/// Loads from a file system that does not answer, beside others.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang.h"
#include "tests/support/hanging_fs.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack {

using testing::GuardedMemory;
using testing::kHang;
using testing::kMiB;

inline constexpr std::uint32_t kDepth = 8;
inline constexpr std::uint32_t kWorkers = 2;
inline constexpr int kCrowd = 400;
inline constexpr int kEnough = 80;  // So many of a crowd are sure to get stuck.

class HangTest : public ::testing::TestWithParam<Backend> {
 protected:
  struct Load {
    std::unique_ptr<GuardedMemory> memory;
    std::optional<Transfer> transfer;
  };

  void SetUp() override {
    fs_ = std::make_unique<testing::HangingFs>(FLASHPACK_HANGING_FS, dir_ / "a mount");
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
    return load.memory->intact() && testing::same_bytes(load.memory->data(), bytes_.data(), bytes_.size());
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

  // Loads through slots, of as many files as can have slots, and more.
  void start_files_that_hang() {
    for (int i = 0; i < 6; ++i) {
      const std::string name = "shard" + std::to_string(i);
      testing::write_file(*fs_ / name, bytes_);
      fs_->hold("read", name);
      start(*fs_ / name, 64);
    }
    ASSERT_TRUE(fs_->wait_until_held("read", "shard0"));
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

  // All the while that the engine takes to give out everything that may get stuck. What is stuck stays so, and is found
  // however much time lies between two loads.
  void expect_that_others_keep_going_on() {
    const Deadline enough = std::chrono::steady_clock::now() + std::chrono::seconds(4);
    while (std::chrono::steady_clock::now() < enough && !HasFatalFailure()) {
      const std::size_t before = loads_.size();
      expect_that_others_go_on();
      while (loads_.size() > before) loads_.pop_back();
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  }

  // Loads of nothing but the first page, of as many files as may be stuck at all, and more.
  void start_a_crowd(const std::function<std::filesystem::path(int)>& path, int count = kCrowd) {
    for (int i = 0; i < count; ++i) {
      Load& load = loads_.emplace_back();
      load.memory = std::make_unique<GuardedMemory>(4096);
      load.transfer = engine_->start_load(request(path(i), *load.memory));
    }
  }

  // The kernel does not ask for more than one name of a directory at a time; the others wait for that.
  void wait_until_stuck(std::ptrdiff_t count) {
    const auto stuck = [](const Load& load) { return load.transfer->progress().outstanding > 0; };
    const Deadline deadline = std::chrono::steady_clock::now() + kHang;
    while (std::count_if(loads_.begin(), loads_.end(), stuck) < count) {
      ASSERT_LT(std::chrono::steady_clock::now(), deadline);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  void expect_that_the_crowd_ends(std::error_code how) {
    for (Load& load : loads_) {
      if (load.memory->size() != 4096) continue;
      ASSERT_EQ(outcome(load), how);
    }
  }

  // Cancelled loads, each with all the reads under way that the engine gives out.
  void leave_stuck_loads(int count, std::size_t phase) {
    fs_->hold("read", "stuck");
    for (int i = 0; i < count; ++i) {
      Load& load = start(*fs_ / "stuck", phase);
      const Deadline deadline = std::chrono::steady_clock::now() + kHang;
      while (load.transfer->progress().outstanding < kDepth) {
        ASSERT_LT(std::chrono::steady_clock::now(), deadline) << i;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      // Threads of the workers that hang already do not get more of the same file.
      if (i == 0) {
        ASSERT_TRUE(fs_->wait_until_held("read", "stuck", GetParam() == Backend::kWorkers ? 1 : kDepth));
      }
      load.transfer->cancel();
    }
  }

  void expect_that_stuck_loads_end(int count) {
    fs_->release();
    for (Load& load : loads_) {
      if (count-- <= 0) break;
      EXPECT_EQ(outcome(load), Errc::kCancelled);
      EXPECT_TRUE(load.memory->intact());
    }
    engine_.reset();
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

}  // namespace flashpack
