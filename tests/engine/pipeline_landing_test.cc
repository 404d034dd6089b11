// These tests hold the pipeline to its promise: a completion is told once of each extent, and never too early.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang.h"
#include "tests/support/pipeline_rig.h"
#include "tests/support/small_loads.h"
#include "tests/support/temp_dir.h"
#include "tests/support/wait_until.h"

namespace flashpack {
namespace {

using testing::GuardedMemory;
using testing::kMiB;
using Rig = testing::PipelineRig;

constexpr auto kNothing = std::chrono::nanoseconds(0);

struct Wanted {
  std::uint64_t offset;
  std::unique_ptr<GuardedMemory> memory;
};

// Keeps what it is told, and looks at the bytes then and there.
struct Recorder final : Completion {
  void landed(std::size_t file, std::size_t extent) noexcept override {
    EXPECT_FALSE(ended) << "told after done()";
    EXPECT_TRUE(told.insert({file, extent}).second) << "told twice";
    if (look) look(file, extent);
    ++count;
  }
  void done(Transfer&) noexcept override { ended = true; }

  std::function<void(std::size_t, std::size_t)> look = {};
  std::set<std::pair<std::size_t, std::size_t>> told;  // Only for the driver before the end.
  std::atomic<std::size_t> count = 0;
  bool ended = false;
};

class PipelineLandingTest : public ::testing::Test {
 protected:
  PipelineLandingTest() { testing::write_file(path_, bytes_); }

  bool right(const Wanted& wanted) const {
    return testing::same_bytes(wanted.memory->data(), bytes_.data() + wanted.offset, wanted.memory->size());
  }

  // Some of no bytes, some in phase with the file, some with bytes that others want, too.
  std::vector<Wanted> random_wanted(std::mt19937_64& random) const {
    std::vector<Wanted> wanted;
    for (auto n = 1 + random() % 6; n > 0; --n) {
      const std::uint64_t offset = random() % 3 || wanted.empty() ? random() % bytes_.size() : wanted.back().offset;
      const std::uint64_t limit = random() % 3 ? 20'000 : 3 * kMiB;
      const std::uint64_t size = random() % 6 ? std::min(1 + random() % limit, bytes_.size() - offset) : 0;
      wanted.push_back({offset, std::make_unique<GuardedMemory>(size, random() % 2 ? offset : random())});
    }
    return wanted;
  }

  static std::vector<Extent> extents_of(const std::vector<Wanted>& wanted) {
    std::vector<Extent> extents;
    for (const Wanted& w : wanted) {
      const bool late = extents.size() % 2;
      extents.push_back({w.offset, w.memory->size(), w.memory->data(), static_cast<std::uint16_t>(late)});
    }
    return extents;
  }

  // Returns when the driver has been through its loop once more.
  void wait_for_driver(Rig& rig) const { rig.start({.path = path_, .extents = {}}).wait(); }

  Checksums checksums() const {
    Checksums sums{.size_bytes = bytes_.size()};
    for (std::size_t begin = 0; begin < bytes_.size(); begin += Checksums::kStripeBytes) {
      const std::size_t size = std::min<std::size_t>(Checksums::kStripeBytes, bytes_.size() - begin);
      sums.crc32c.push_back(crc32c(std::span(bytes_).subspan(begin, size)));
    }
    return sums;
  }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "file";
  std::vector<std::byte> bytes_ = testing::random_bytes(6 * kMiB + 777);
};

TEST_F(PipelineLandingTest, EachExtentIsToldOnceWithItsBytesWhateverTheDiskDoes) {
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937_64 random(seed);
    const testing::Faults faults{.short_percent = 40, .interrupt_percent = 20, .refuse_percent = seed % 4 == 0 ? 5 : 0};
    Rig rig(seed, faults, seed % 2 ? Rig::Shape::kRealWorkers : Rig::Shape::kTwoQueues);
    for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered, CachePolicy::kAuto}) {
      const auto wanted = random_wanted(random);
      Recorder recorder;
      recorder.look = [&](std::size_t, std::size_t extent) { EXPECT_TRUE(right(wanted.at(extent))); };
      rig.start({.path = path_,
                 .extents = extents_of(wanted),
                 .cache = cache,
                 .completion = &recorder,
                 .checksums = random() % 2 ? std::optional(checksums()) : std::nullopt,
                 .report_extents = true})
          .wait();
      EXPECT_EQ(recorder.told.size(), wanted.size()) << "seed " << seed;
      EXPECT_TRUE(recorder.ended);
    }
  }
}

TEST_F(PipelineLandingTest, AnExtentThatIsToldKeepsItsBytesThoughTheLoadFails) {
  std::size_t told = 0;
  int failed = 0;
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937_64 random(seed);
    Rig rig(seed, {.short_percent = 20, .error_percent = 15});
    const auto wanted = random_wanted(random);
    Recorder recorder;
    Transfer transfer =
        rig.start({.path = path_, .extents = extents_of(wanted), .completion = &recorder, .report_extents = true});
    try {
      transfer.wait();
    } catch (const Error&) {
      ++failed;
      told += recorder.told.size();
    }
    rig.stop();
    for (const auto& [file, extent] : recorder.told) EXPECT_TRUE(right(wanted.at(extent)));
  }
  EXPECT_GT(failed, 0);
  EXPECT_GT(told, 0u);
}

TEST_F(PipelineLandingTest, NumbersAreThoseOfTheRequest) {
  Engine engine(testing::small_engine());
  std::vector<std::unique_ptr<GuardedMemory>> memory;
  LoadRequest request{.report_extents = true};
  for (std::uint64_t file = 0; file < 3; ++file) {
    request.files.push_back({.path = path_});
    for (std::uint64_t extent = 0; extent < 4; ++extent) {
      memory.push_back(std::make_unique<GuardedMemory>(extent == 1 ? 0 : 400'000));
      request.files.back().extents.push_back(
          {(4 * file + extent) * 50'000, memory.back()->size(), memory.back()->data()});
    }
  }
  request.files[1].extents.clear();
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    for (const auto& each : memory) std::fill_n(each->data(), each->size(), std::byte{});
    request.cache = cache;
    Recorder recorder;
    recorder.look = [&](std::size_t file, std::size_t extent) {
      const Extent& told = request.files.at(file).extents.at(extent);
      EXPECT_TRUE(testing::same_bytes(told.target, bytes_.data() + told.offset_bytes, told.size_bytes));
    };
    engine.start_load(request, &recorder).wait();
    EXPECT_EQ(recorder.told.size(), 8u);
  }
}

TEST_F(PipelineLandingTest, ExtentsThatAreReadWhereTheFileIsOpenedAreTold) {
  const testing::HeldInCache held(path_);
  Rig rig(1, {}, Rig::Shape::kRealWorkers, kMiB, 3, nullptr, 0, 64 << 10);
  GuardedMemory memory(1000);
  std::fill_n(memory.data(), memory.size(), std::byte{});
  Recorder recorder;
  recorder.look = [&](std::size_t, std::size_t extent) {
    EXPECT_TRUE(extent == 2 || testing::same_bytes(memory.data() + 500 * extent, bytes_.data() + 100, 500));
  };
  Transfer transfer =
      rig.start({.path = path_,
                 .extents = {{100, 500, memory.data()}, {100, 500, memory.data() + 500}, {0, 0, nullptr}},
                 .cache = CachePolicy::kBuffered,
                 .completion = &recorder,
                 .report_extents = true});
  EXPECT_EQ(transfer.wait().operations, 1u);
  EXPECT_EQ(recorder.told.size(), 3u);
  Recorder of_no_file;
  Transfer fails =
      rig.start({.path = dir_ / "nothing", .extents = {{}}, .completion = &of_no_file, .report_extents = true});
  EXPECT_THROW(fails.wait(), Error);
  EXPECT_TRUE(of_no_file.told.empty());
}

TEST_F(PipelineLandingTest, NothingIsToldUnlessItIsAskedFor) {
  Rig rig(1, {});
  GuardedMemory memory(kMiB);
  Recorder recorder;
  rig.start({.path = path_, .extents = {{0, memory.size(), memory.data()}}, .completion = &recorder}).wait();
  EXPECT_TRUE(recorder.told.empty());
  EXPECT_TRUE(recorder.ended);
}

TEST_F(PipelineLandingTest, AnExtentIsToldWhileAnotherOneIsRead) {
  Rig rig(1, {});
  rig.get_stuck_from(kMiB / 2);
  GuardedMemory memory(kMiB);
  const std::vector<Extent> halves = {{0, kMiB / 2, memory.data()}, {kMiB / 2, kMiB / 2, memory.data() + kMiB / 2}};
  Recorder recorder;
  Transfer transfer = rig.start({.path = path_, .extents = halves, .completion = &recorder, .report_extents = true});
  testing::wait_until([&] { return recorder.count > 0; });
  EXPECT_TRUE(testing::same_bytes(memory.data(), bytes_.data(), kMiB / 2));
  EXPECT_FALSE(transfer.wait_for(kNothing));
  EXPECT_EQ(recorder.count, 1u);
  rig.get_stuck_from(bytes_.size());
  transfer.wait();
  EXPECT_EQ(recorder.count, 2u);
}

TEST_F(PipelineLandingTest, ExtentsThatAreReadOneAtATimeLandByPriorityAndThenInTheOrderOfTheFile) {
  EngineOptions options = testing::small_engine();
  options.queue_depth = options.workers = 1;
  Engine engine(options);
  GuardedMemory memory(6 * kMiB);
  FileExtents file{.path = path_};
  for (const auto& [mib, priority] : {std::pair{5, 2}, {1, 7}, {3, 2}, {0, 7}, {4, 0}, {2, 2}}) {
    const std::uint64_t at = static_cast<std::uint64_t>(mib) * kMiB;
    file.extents.push_back({at, kMiB, memory.data() + at, static_cast<std::uint16_t>(priority)});
  }
  std::vector<std::uint64_t> order;
  Recorder recorder;
  recorder.look = [&](std::size_t, std::size_t extent) { order.push_back(file.extents[extent].offset_bytes / kMiB); };
  engine.start_load({.files = {file}, .cache = CachePolicy::kDirect, .report_extents = true}, &recorder).wait();
  EXPECT_EQ(order, (std::vector<std::uint64_t>{4, 2, 3, 5, 0, 1}));
}

TEST_F(PipelineLandingTest, WithChecksumsAnExtentWaitsForTheRestOfItsStripes) {
  Rig rig(1, {});
  rig.get_stuck_from(kMiB / 2);
  GuardedMemory memory(kMiB);
  const std::vector<Extent> halves = {{0, kMiB / 2, memory.data()}, {kMiB / 2, kMiB / 2, memory.data() + kMiB / 2}};
  Recorder recorder;
  Transfer transfer = rig.start(
      {.path = path_, .extents = halves, .completion = &recorder, .checksums = checksums(), .report_extents = true});
  testing::wait_until([&] { return transfer.progress().done_bytes >= kMiB / 2; });
  wait_for_driver(rig);
  EXPECT_EQ(recorder.count, 0u);
  rig.get_stuck_from(bytes_.size());
  transfer.wait();
  EXPECT_EQ(recorder.count, 2u);
}

TEST_F(PipelineLandingTest, NoExtentOfACorruptStripeIsTold) {
  constexpr std::size_t kCorrupt = 2;
  Checksums sums = checksums();
  sums.crc32c[kCorrupt] ^= 1;
  Engine engine_of_stripes(testing::small_engine());
  EngineOptions options = testing::small_engine();
  options.chunk_bytes = 4 * kMiB;  // Several stripes land together.
  options.staging_bytes = 4 * options.chunk_bytes;
  Engine engine_of_many(options);
  std::size_t told = 0;
  for (int round = 0; round < 60; ++round) {
    Engine& engine = round < 30 ? engine_of_stripes : engine_of_many;
    const std::size_t phase = round % 2 ? 0 : 7;
    GuardedMemory memory(bytes_.size(), phase);
    FileExtents file{.path = path_, .checksums = &sums};
    for (std::uint64_t at = 0; at < bytes_.size(); at += 300'000) {
      // Every other round, what is last in the file is wanted first.
      const auto priority = static_cast<std::uint16_t>(round % 2 ? (bytes_.size() - at) / 300'000 : 0);
      file.extents.push_back({at, std::min<std::uint64_t>(300'000, bytes_.size() - at), memory.data() + at, priority});
    }
    Recorder recorder;
    recorder.look = [&](std::size_t, std::size_t index) {
      const Extent& extent = file.extents.at(index);
      EXPECT_TRUE(extent.offset_bytes >= (kCorrupt + 1) * kMiB ||
                  extent.offset_bytes + extent.size_bytes <= kCorrupt * kMiB);
    };
    Transfer transfer = engine.start_load(
        {.files = {file}, .cache = round % 3 ? CachePolicy::kDirect : CachePolicy::kBuffered, .report_extents = true},
        &recorder);
    try {
      transfer.wait();
      FAIL();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kCorrupt);
      EXPECT_EQ(error.offset_bytes(), kCorrupt * kMiB);
    }
    told += recorder.told.size();
  }
  EXPECT_GT(told, 0u) << "of the stripes before";
}

TEST_F(PipelineLandingTest, TheCallMayCancelItsLoadAndStartAnother) {
  Rig rig(1, {});
  rig.get_stuck_from(kMiB);
  GuardedMemory memory(3 * kMiB);
  GuardedMemory other(5000);
  Recorder recorder;
  std::atomic<bool> started = false;
  Transfer transfer;
  Transfer another;
  recorder.look = [&](std::size_t, std::size_t) {
    started.wait(false);
    transfer.cancel();
    another = rig.start({.path = path_, .extents = {{9, other.size(), other.data()}}});
  };
  transfer = rig.start({.path = path_,
                        .extents = {{0, kMiB, memory.data()}, {kMiB, 2 * kMiB, memory.data() + kMiB}},
                        .completion = &recorder,
                        .report_extents = true});
  started = true;
  started.notify_one();
  testing::wait_until([&] { return recorder.count > 0; });
  rig.get_stuck_from(bytes_.size());
  EXPECT_THROW(transfer.wait(), Error);
  EXPECT_EQ(transfer.error(), Errc::kCancelled);
  EXPECT_EQ(recorder.told.size(), 1u);
  another.wait();
  EXPECT_TRUE(testing::same_bytes(other.data(), bytes_.data() + 9, other.size()));
}

// The example of transfer.h.
struct Layers final : Completion {
  void landed(std::size_t, std::size_t layer) noexcept override { tell(ready[layer]); }
  void done(Transfer& load) noexcept override {
    failed = static_cast<bool>(load.error());
    for (auto& layer : ready) tell(layer);
  }
  static void tell(std::atomic<bool>& layer) { layer = true, layer.notify_one(); }
  std::array<std::atomic<bool>, 6> ready{};
  std::atomic<bool> failed = false;
};

TEST_F(PipelineLandingTest, LayersAreUsedInTheirOrderWhileTheRestIsRead) {
  Engine engine(testing::small_engine());
  GuardedMemory memory(6 * kMiB);
  FileExtents file{.path = path_};
  for (std::uint16_t layer = 0; layer < 6; ++layer) {  // The last layer comes first in the file.
    const std::uint64_t offset = (5 - layer) * std::uint64_t{kMiB};
    file.extents.push_back({offset, kMiB, memory.data() + offset, layer});
  }
  for (const bool fails : {false, true}) {
    if (fails) file.expected = FileIdentity{};
    Layers layers;
    Transfer load = engine.start_load({.files = {file}, .report_extents = true}, &layers);
    std::size_t used = 0;
    for (std::size_t layer = 0; layer < 6; ++layer) {
      layers.ready[layer].wait(false);
      if (layers.failed) break;
      const Extent& extent = file.extents[layer];
      EXPECT_TRUE(testing::same_bytes(extent.target, bytes_.data() + extent.offset_bytes, kMiB));
      ++used;
    }
    EXPECT_EQ(used, fails ? 0u : 6u);
    EXPECT_TRUE(load.wait_for(testing::kHang));
    EXPECT_EQ(static_cast<bool>(load.error()), fails);
  }
}

}  // namespace
}  // namespace flashpack
