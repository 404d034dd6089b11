#include "engine/workers.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "tests/support/guarded_memory.h"
#include "tests/support/small_file_test.h"

namespace flashpack::internal {
namespace {

using flashpack::testing::GuardedMemory;

class WorkersTest : public flashpack::testing::SmallFileTest {
 protected:
  Pool pool_{2};
  Workers workers_{pool_, 8, nullptr};
};

TEST_F(WorkersTest, DiskThreadsReadAndWriteOnceAndShortAtTheEndOfTheFile) {
  DiskThreads disk(pool_, 8, nullptr, "no ring");
  EXPECT_EQ(disk.fallback_reason(), "no ring");
  EXPECT_FALSE(disk.refuses());
  const auto result_of = [&](const DiskRequest& request) {
    disk.push(3, request);
    const auto done = disk.wait(std::nullopt);
    EXPECT_EQ(done.size(), 1u);
    EXPECT_EQ(done.front().tag, 3u);
    return done.front().result;
  };
  GuardedMemory memory(5000);
  const std::span bytes(memory.data(), memory.size());
  EXPECT_EQ(result_of({.op = DiskRequest::Op::kRead, .fd = fd_.get(), .offset_bytes = 100, .memory = bytes}), 5000);
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), bytes_.begin() + 100));
  EXPECT_EQ(result_of({.op = DiskRequest::Op::kWrite, .fd = fd_.get(), .offset_bytes = 7, .memory = bytes}), 5000);
  const auto written = flashpack::testing::read_file(dir_ / "file");
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), written.begin() + 7));
  EXPECT_EQ(result_of({.op = DiskRequest::Op::kRead, .fd = fd_.get(), .offset_bytes = 299'000, .memory = bytes}), 1000);
  EXPECT_EQ(result_of({.op = DiskRequest::Op::kRead, .fd = -1, .memory = bytes}), -EBADF);
  EXPECT_TRUE(memory.intact());
}

TEST_F(WorkersTest, CancelledOperationsEndOnceAndSomeOfThemUndone) {
  Pool pool(1);
  Workers one(pool, 8, nullptr);
  std::vector<std::unique_ptr<GuardedMemory>> memory;
  std::vector<Fragment> fragments;
  for (unsigned tag = 0; tag < 8; ++tag) {
    memory.push_back(std::make_unique<GuardedMemory>(bytes_.size()));
    fragments.push_back({0, bytes_.size(), memory.back()->data()});
  }
  unsigned undone = 0;
  for (int round = 0; round < 1000 && undone == 0; ++round) {
    for (unsigned tag = 0; tag < 8; ++tag) {
      one.push(tag, {.op = ByteWork::Op::kFromCache, .fd = fd_.get(), .fragments = {&fragments[tag], 1}});
    }
    for (unsigned tag = 0; tag < 8; ++tag) one.cancel(tag);
    std::set<unsigned> ended;
    while (ended.size() < 8) {
      for (const IoCompletion& done : one.wait(std::nullopt)) {
        EXPECT_TRUE(ended.insert(done.tag).second);
        undone += done.result == -ECANCELED;
        EXPECT_TRUE(done.result == -ECANCELED || done.result == 300'000) << done.result;
      }
    }
  }
  EXPECT_GT(undone, 0u);
}

TEST_F(WorkersTest, WakeEndsTheWaitOnceEvenWhenItCameFirst) {
  workers_.wake();
  EXPECT_TRUE(workers_.wait(std::nullopt).empty());
  EXPECT_TRUE(workers_.wait(std::chrono::nanoseconds(1)).empty());
  std::thread waker([this] { workers_.wake(); });
  EXPECT_TRUE(workers_.wait(std::nullopt).empty());
  waker.join();
}

}  // namespace
}  // namespace flashpack::internal
