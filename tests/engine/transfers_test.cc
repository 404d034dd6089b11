// Many files and many transfers at a time.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "engine/ground/unique_fd.h"
#include "flashpack/engine.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang.h"
#include "tests/support/pipeline_rig.h"
#include "tests/support/sandbox.h"
#include "tests/support/sanitizers.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

using testing::kMiB;

constexpr std::size_t kSmallBytes = 5000;

class PartsTest : public ::testing::TestWithParam<Backend> {
 protected:
  std::filesystem::path file(std::size_t index) const { return dir_ / std::to_string(index); }

  void write_files(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) testing::write_file(file(i), bytes_);
  }

  // In a child with so few descriptors. What `body` gives back.
  int with_few_descriptors(const std::function<int(Engine&)>& body, rlim_t count = 90) {
    return testing::run_in_child([&] {
      const rlimit few{count, count};
      if (::setrlimit(RLIMIT_NOFILE, &few) != 0) return testing::kSkip;
      Engine engine({.chunk_bytes = kMiB, .staging_bytes = 4 * kMiB, .workers = 2, .backend = GetParam()});
      return body(engine);
    });
  }

  bool right(const std::vector<std::byte>& memory) const { return memory == bytes_; }

  testing::TempDir dir_;
  const std::vector<std::byte> bytes_ = testing::random_bytes(kSmallBytes);
};

INSTANTIATE_TEST_SUITE_P(Backends, PartsTest, ::testing::Values(Backend::kAuto, Backend::kWorkers),
                         [](const auto& backend) { return backend.param == Backend::kAuto ? "Auto" : "Workers"; });

TEST_P(PartsTest, AThousandLoadsAtATimeNeedFewDescriptors) {
  write_files(300);
  const auto load_all = [&](Engine& engine) {
    std::vector<std::vector<std::byte>> memory(1000, std::vector<std::byte>(kSmallBytes));
    std::vector<Transfer> transfers;
    for (std::size_t i = 0; i < memory.size(); ++i) {
      transfers.push_back(
          engine.start_load({.files = {{.path = file(i % 300), .extents = {{0, kSmallBytes, memory[i].data()}}}}}));
    }
    const std::string too_many = std::make_error_code(std::errc::too_many_files_open).message();
    for (Transfer& transfer : transfers) {
      if (transfer.wait().fallback_reason.find(too_many) != std::string::npos) return 2;
    }
    return std::all_of(memory.begin(), memory.end(), [&](const auto& m) { return right(m); }) ? 0 : 1;
  };
  // With 40 they are not enough for as many files as may be open at a time.
  for (const rlim_t descriptors : {90u, 40u}) {
    EXPECT_EQ(with_few_descriptors(load_all, descriptors), 0)
        << descriptors << "; 1: wrong bytes, 2: a file was not opened for direct reads";
  }
}

// A descriptor for direct reads has to be opened again for others, which takes one more.
TEST_P(PartsTest, ALoadByDescriptorThatFindsNoOtherFailsAndNeverReadsWhatIsAtThePath) {
  // With it goes the sanitizer of undefined behaviour, which needs descriptors to look.
  if (testing::kAddressSanitizer) GTEST_SKIP() << "a sanitizer needs descriptors of its own";
  write_files(2);
  const int status = with_few_descriptors([&](Engine& engine) {
    std::vector<std::byte> memory(kSmallBytes);
    int outcome = 0;
    for (int round = 0; round < 20 && outcome == 0; ++round) {
      const int given = ::open(file(0).c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
      if (given < 0) return testing::kSkip;
      std::vector<std::vector<std::byte>> others(40, std::vector<std::byte>(kSmallBytes));
      std::vector<Transfer> transfers;  // Some of them are open, so that to wait for descriptors looks useful.
      for (auto& other : others) {
        transfers.push_back(
            engine.start_load({.files = {{.path = file(0), .extents = {{0, kSmallBytes, other.data()}}}},
                               .cache = CachePolicy::kDirect}));
      }
      std::vector<internal::UniqueFd> taken;
      while (taken.emplace_back(::dup(given))) continue;
      taken.pop_back();
      if (!taken.empty()) taken.pop_back();  // One for the engine's duplicate.
      std::error_code error;
      Transfer load = engine.start_load(
          {.files = {{.path = "not there", .extents = {{0, kSmallBytes, memory.data()}}, .fd = given}}}, nullptr,
          error);
      if (load.valid() && !load.wait_for(testing::kHang)) return 2;
      taken.clear();
      ::close(given);
      if (!load.valid()) continue;
      const std::error_code how = load.error();
      if (how && how != std::errc::too_many_files_open) outcome = 3;
      if (!how && !right(memory)) outcome = 4;
    }
    return outcome;
  });
  if (status == testing::kSkip) GTEST_SKIP() << "no direct I/O here";
  EXPECT_EQ(status, 0) << "2: it hangs, 3: another file was looked for, 4: wrong bytes";
}

// In each turn of its loop the driver looks at a bounded number of chunks, here of reads that go both ways in turns.
TEST_P(PartsTest, LoadsWhoseLastChunksAreTheLastOfATurnEndOnce) {
  constexpr std::size_t kLoads = 48;
  constexpr std::size_t kBytes = 300'000;  // More than is read where the file is opened.
  testing::write_file(dir_ / "file", std::vector<std::byte>((kLoads + 1) * kMiB));
  Engine engine({.backend = GetParam()});
  const FileHandle file = engine.open(dir_ / "file");
  std::vector<std::byte> memory(kLoads * kBytes);
  for (std::size_t round = 0; round < 200; ++round) {
    std::vector<Transfer> transfers;
    for (std::size_t i = 0; i < kLoads; ++i) {
      FileExtents wanted{.path = dir_ / "file", .extents = {{kMiB * i + 1296, kBytes, memory.data() + kBytes * i}}};
      if (round % 4 < 2) wanted.handle = file;
      const bool direct = (7 * i + round) % 2 == 0;
      transfers.push_back(
          engine.start_load({.files = {wanted}, .cache = direct ? CachePolicy::kDirect : CachePolicy::kBuffered}));
    }
    for (Transfer& transfer : transfers) transfer.wait();
  }
}

TEST_P(PartsTest, ALoadOfManyFilesNeedsFewDescriptors) {
  write_files(600);
  const int status = with_few_descriptors([&](Engine& engine) {
    std::vector<std::vector<std::byte>> memory(600, std::vector<std::byte>(kSmallBytes));
    LoadRequest request;
    for (std::size_t i = 0; i < memory.size(); ++i)
      request.files.push_back({.path = file(i), .extents = {{0, kSmallBytes, memory[i].data()}}});
    engine.load(std::move(request));
    return std::all_of(memory.begin(), memory.end(), [&](const auto& m) { return right(m); }) ? 0 : 1;
  });
  EXPECT_EQ(status, 0);
}

TEST_P(PartsTest, ALoadThatNamesEachOfManyFilesTwiceKeepsNoneOpenThatItHasRead) {
  write_files(300);
  const int status = with_few_descriptors([&](Engine& engine) {
    std::vector<std::vector<std::byte>> memory(600, std::vector<std::byte>(kSmallBytes));
    LoadRequest request{.cache = CachePolicy::kDirect};
    for (std::size_t i = 0; i < memory.size(); ++i)
      request.files.push_back({.path = file(i / 2), .extents = {{0, kSmallBytes, memory[i].data()}}});
    const TransferStats stats = engine.load(std::move(request));
    const std::string too_many = std::make_error_code(std::errc::too_many_files_open).message();
    if (stats.fallback_reason.find(too_many) != std::string::npos) return 2;
    return std::all_of(memory.begin(), memory.end(), [&](const auto& m) { return right(m); }) ? 0 : 1;
  });
  EXPECT_EQ(status, 0) << "1: wrong bytes, 2: a file was not opened for direct reads, else an error";
}

TEST_P(PartsTest, TheFirstOfManyFilesThatIsMissingFailsTheLoadAndLeavesNothingOpen) {
  write_files(100);
  const int status = with_few_descriptors([&](Engine& engine) {
    for (int round = 0; round < 20; ++round) {
      std::vector<std::vector<std::byte>> memory(101, std::vector<std::byte>(kSmallBytes));
      LoadRequest request;
      for (std::size_t i = 0; i < memory.size(); ++i)
        request.files.push_back({.path = file(i), .extents = {{0, kSmallBytes, memory[i].data()}}});
      try {
        engine.load(std::move(request));
        return 1;
      } catch (const Error& error) {
        if (error.code() != std::errc::no_such_file_or_directory || error.path() != file(100)) return 2;
      }
    }
    return 0;
  });
  EXPECT_EQ(status, 0);
}

struct Note final : Completion {
  void done(Transfer&) noexcept override { call(); }
  std::function<void()> call;
};

TEST(PipelinePartsTest, ASmallLoadDoesNotWaitBehindALargeOneThatWasThereBefore) {
  constexpr std::uint32_t kChunk = 64 << 10;
  testing::TempDir dir;
  testing::write_file(dir / "file", testing::random_bytes(200 * kChunk));
  testing::GuardedMemory large(200 * kChunk);
  testing::GuardedMemory small(4096);
  testing::PipelineRig rig(1, {}, testing::PipelineRig::Shape::kRealWorkers, kChunk, 8);
  std::string order;
  Note start;
  Note large_done;
  Note small_done;
  large_done.call = [&] { order += "large "; };
  small_done.call = [&] { order += "small "; };
  start.call = [&] {  // On the driver thread, so that it finds both at once.
    rig.start({.path = dir / "file", .extents = {{0, large.size(), large.data()}}, .completion = &large_done}).detach();
    rig.start({.path = dir / "file", .extents = {{8192, small.size(), small.data()}}, .completion = &small_done})
        .detach();
  };
  rig.start({.path = dir / "file", .extents = {}, .completion = &start}).wait();
  rig.stop();
  EXPECT_EQ(order, "small large ");
}

}  // namespace
}  // namespace flashpack
