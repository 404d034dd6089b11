// Thousands of random loads on queues that fail in every way at once: each ends in the right bytes or in a clean error,
// with nothing in flight and nothing outside the targets touched. On some of them the reads of one file hang in
// between, and the loads of the others go on.
//
//   FLASHPACK_SOAK_SEED=7 FLASHPACK_SOAK_LOADS=100000 FLASHPACK_SOAK_HANGS=10 engine_test --gtest_filter='*Soak*'
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang.h"
#include "tests/support/pipeline_rig.h"
#include "tests/support/spin.h"
#include "tests/support/temp_dir.h"

namespace flashpack::internal {
namespace {

using flashpack::testing::GuardedMemory;
using flashpack::testing::kHang;
using Rig = flashpack::testing::PipelineRig;

constexpr std::uint32_t kChunkBytes = 256 << 10;  // Smaller than an engine allows: many chunks in little time.
constexpr int kLoadsPerRig = 25;
// Only the largest file has bytes there: where a rig hangs, reads from here on do not come back until they are let go.
constexpr std::uint64_t kHangingFrom = 400'000;
constexpr std::uint64_t kNowhere = std::numeric_limits<std::uint64_t>::max();

unsigned long from_environment(const char* name, unsigned long otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoul(text, nullptr, 10) : otherwise;
}

struct Count {
  int right = 0;
  int hanging_rigs = 0;
  std::size_t hangs = 0;
  std::map<std::string, int> errors;

  int of(std::error_code code) const {
    const auto found = errors.find(code.message());
    return found == errors.end() ? 0 : found->second;
  }
};

class PipelineSoakTest : public ::testing::TestWithParam<std::tuple<Rig::Shape, unsigned>> {
 protected:
  struct Target {
    std::uint64_t offset_bytes;
    std::unique_ptr<GuardedMemory> memory;
  };
  // Looks at each extent when it is told that it has landed.
  struct Looks final : Completion {
    void landed(std::size_t, std::size_t index) noexcept override {
      const Extent& extent = extents.at(index);
      ++told;
      EXPECT_TRUE(testing::same_bytes(extent.target, bytes->data() + extent.offset_bytes, extent.size_bytes))
          << "told early";
    }
    void done(Transfer&) noexcept override {}

    std::vector<Extent> extents;
    const std::vector<std::byte>* bytes = nullptr;
    std::size_t told = 0;
  };

  struct Started {
    std::vector<Target> targets;
    std::unique_ptr<Looks> looks = {};  // Null if the load has no completion.
    Transfer transfer = {};             // Last: ends before the memory goes.
  };

  PipelineSoakTest() {
    std::tie(shape_, seed_) = GetParam();
    seed_ += static_cast<unsigned>(1000 * from_environment("FLASHPACK_SOAK_SEED", 0));
    random_.seed(seed_);
    for (const std::size_t size : {std::size_t{1'500'777}, std::size_t{300'000}, std::size_t{4097}}) {
      files_.push_back(dir_ / std::to_string(size));
      bytes_.push_back(flashpack::testing::random_bytes(size, seed_));
      flashpack::testing::write_file(files_.back(), bytes_.back());
      StripeSums sums(0, size);
      sums.add(0, bytes_.back());
      Checksums& checksums = checksums_.emplace_back(Checksums{.size_bytes = size});
      for (std::uint64_t begin = 0; begin < size; begin += Checksums::kStripeBytes) {
        const std::uint64_t fragment = std::min<std::uint64_t>(Checksums::kStripeBytes, size - begin);
        checksums.crc32c.push_back(sums.crc32c(begin / Checksums::kStripeBytes, static_cast<std::uint32_t>(fragment)));
      }
    }
  }

  std::uint64_t below(std::uint64_t end) { return random_() % end; }
  bool chance(unsigned percent) { return below(100) < percent; }
  int up_to(int percent) { return static_cast<int>(below(static_cast<std::uint64_t>(percent) + 1)); }

  std::vector<Target> random_targets(std::uint64_t file_bytes) {
    std::vector<Target> targets;
    if (chance(20)) {  // All of it, which can be verified.
      targets.push_back({0, std::make_unique<GuardedMemory>(file_bytes, below(2))});
      return targets;
    }
    std::uint64_t offset = below(file_bytes);
    for (auto n = 1 + below(8); n > 0; --n) {
      // Near each other and far apart, overlapping in the file or not, small and of several chunks, of any phase.
      offset = chance(60) ? std::min(offset + below(20'000), file_bytes - 1) : below(file_bytes);
      const std::uint64_t size = std::min(below(chance(70) ? 10'000 : 900'000), file_bytes - offset);
      targets.push_back({offset, std::make_unique<GuardedMemory>(size, chance(50) ? offset : below(4096))});
      offset += size / 2;
    }
    return targets;
  }

  Started start(Rig& rig, std::size_t file, const std::filesystem::path& path) {
    Started started{.targets = random_targets(bytes_[file].size())};
    constexpr std::array kPolicies = {CachePolicy::kAuto, CachePolicy::kDirect, CachePolicy::kBuffered};
    Rig::Load load{.path = path, .cache = kPolicies[below(kPolicies.size())], .cancelled = chance(1)};
    for (const Target& target : started.targets) {
      if (target.memory->size() > 0)
        load.extents.push_back({target.offset_bytes, target.memory->size(), target.memory->data()});
    }
    if (load.extents.size() == 1 && started.targets.size() == 1) load.checksums = checksums_[file];
    if (chance(10)) load.deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(below(2000));
    if (chance(50) && path == files_[file]) {  // Bytes that are told may be wrong if their file changes meanwhile.
      started.looks = std::make_unique<Looks>();
      started.looks->extents = load.extents;
      started.looks->bytes = &bytes_[file];
      load.completion = started.looks.get();
      load.report_extents = true;
      for (Extent& extent : load.extents) extent.priority = static_cast<std::uint16_t>(below(2));
    }
    started.transfer = rig.start(load);
    return started;
  }

  void finish(Started& started, std::size_t file, Count& count) {
    ASSERT_TRUE(started.transfer.wait_for(kHang)) << "it hangs";
    EXPECT_EQ(started.transfer.progress().outstanding, 0u);
    try {
      started.transfer.wait();
      if (started.looks) {
        EXPECT_EQ(started.looks->told, started.looks->extents.size());
      }
      for (const Target& target : started.targets) {
        ASSERT_TRUE(testing::same_bytes(target.memory->data(), bytes_[file].data() + target.offset_bytes,
                                        target.memory->size()))
            << "wrong bytes at " << target.offset_bytes;
      }
      ++count.right;
    } catch (const Error& error) {
      ++count.errors[error.code().message()];
      const bool clean = error.code() == std::errc::io_error || error.code() == std::errc::interrupted ||
                         error.code() == std::errc::resource_unavailable_try_again ||
                         error.code() == Errc::kTruncated || error.code() == Errc::kFileChanged ||
                         error.code() == Errc::kCancelled || error.code() == Errc::kDeadlineExceeded;
      EXPECT_TRUE(clean) << error.what();
      EXPECT_FALSE(error.path().empty());
    }
    for (const Target& target : started.targets) ASSERT_TRUE(target.memory->intact()) << "bytes outside a target";
  }

  // Before something that waits for a load of that file.
  void let_go(Rig& rig, std::size_t file) {
    if (file == 0) rig.get_stuck_from(kNowhere);
  }

  // What the caller does to a transfer while it runs.
  void disturb(Rig& rig, std::size_t file, Started& started) {
    flashpack::testing::spin(std::chrono::microseconds(below(100)));
    if (chance(20)) std::thread([&] { started.transfer.cancel(); }).join();
    if (!chance(5)) return;
    let_go(rig, file);
    started.transfer = Transfer();
  }

  void soak_one_rig(Count& count) {
    const int strength = static_cast<int>(below(3));
    const flashpack::testing::Faults faults{.short_percent = up_to(40),
                                            .interrupt_percent = up_to(30),
                                            .error_percent = up_to(strength),
                                            .refuse_percent = up_to(2 * strength),
                                            .nothing_percent = up_to(strength),
                                            .uncached_percent = up_to(50)};
    const bool hangs = chance(hanging_rig_percent_);
    const auto slots = static_cast<std::uint32_t>(hangs ? 2 * Rig::kQueueDepth : 2 + below(3));
    // Some that read little at once, past the faulty queues.
    const std::uint32_t at_once_bytes = chance(20) ? 64u << 10 : 0;
    Rig rig(static_cast<unsigned>(random_()), faults, shape_, kChunkBytes, slots, nullptr, hangs ? slots : 0,
            at_once_bytes);
    const auto shrinking = dir_ / "shrinking";
    flashpack::testing::write_file(shrinking, bytes_[0]);
    std::deque<std::pair<std::size_t, Started>> running;
    for (int load = 0; load < kLoadsPerRig; ++load) {
      const bool shrinks = !hangs && chance(8);
      const std::size_t file = shrinks ? 0 : below(files_.size());
      if (hangs && chance(30)) rig.get_stuck_from(kHangingFrom);
      running.emplace_back(file, start(rig, file, shrinks ? shrinking : files_[file]));
      if (shrinks) std::filesystem::resize_file(shrinking, below(bytes_[0].size()));
      if (shrinks) flashpack::testing::write_file(dir_ / "new", bytes_[0]);
      if (shrinks) std::filesystem::rename(dir_ / "new", shrinking);
      disturb(rig, file, running.back().second);
      while (running.size() > below(5)) {
        auto& [first_file, first] = running.front();
        let_go(rig, first_file);
        if (first.transfer.valid()) finish(first, first_file, count);
        if (HasFatalFailure()) return rig.get_stuck_from(kNowhere);
        running.pop_front();
      }
    }
    rig.get_stuck_from(kNowhere);
    rig.stop();
    EXPECT_TRUE(rig.idle());
    count.hanging_rigs += hangs;
    count.hangs += rig.hangs();
    for (auto& [file, started] : running) {
      if (started.transfer.valid()) finish(started, file, count);
    }
  }

  const unsigned hanging_rig_percent_ = static_cast<unsigned>(from_environment("FLASHPACK_SOAK_HANGS", 10));
  flashpack::testing::TempDir dir_;
  Rig::Shape shape_{};
  unsigned seed_ = 0;
  std::mt19937_64 random_;
  std::vector<std::filesystem::path> files_;
  std::vector<std::vector<std::byte>> bytes_;
  std::vector<Checksums> checksums_;
};

constexpr unsigned kParts = 5;

// 2 shapes x 5 parts x 1000 loads.
INSTANTIATE_TEST_SUITE_P(Shapes, PipelineSoakTest,
                         ::testing::Combine(::testing::Values(Rig::Shape::kTwoQueues, Rig::Shape::kRealWorkers),
                                            ::testing::Range(0u, kParts)),
                         [](const auto& part) {
                           const bool two = std::get<0>(part.param) == Rig::Shape::kTwoQueues;
                           return (two ? "TwoQueues" : "RealWorkers") + std::to_string(std::get<1>(part.param));
                         });

TEST_P(PipelineSoakTest, EveryLoadEndsInTheRightBytesOrACleanError) {
  const auto loads = static_cast<int>(from_environment("FLASHPACK_SOAK_LOADS", 10'000) / (2 * kParts));
  Count count;
  for (int done = 0; done < loads && !HasFatalFailure(); done += kLoadsPerRig) {
    SCOPED_TRACE("seed " + std::to_string(seed_) + ", after " + std::to_string(done) + " loads");
    soak_one_rig(count);
  }
  std::string told = std::to_string(count.right) + " right";
  for (const auto& [message, times] : count.errors) told += ", " + std::to_string(times) + " " + message;
  std::printf("%s; %d rigs hang, %zu times\n", told.c_str(), count.hanging_rigs, count.hangs);
  // A soak in which nothing fails, or nothing succeeds, shows nothing.
  EXPECT_GT(count.right, loads / 4);
  EXPECT_GT(count.of(Errc::kTruncated), 0);
  // Real workers neither fail nor hang, and what does so in the disk alone is too little to be expected.
  if (shape_ == Rig::Shape::kTwoQueues) {
    EXPECT_GT(count.of(std::make_error_code(std::errc::io_error)), 0);
    EXPECT_EQ(count.hangs > 0, count.hanging_rigs > 0);
  }
  EXPECT_GT(count.of(Errc::kCancelled) + count.of(Errc::kDeadlineExceeded), loads / 40);
}

}  // namespace
}  // namespace flashpack::internal
