// Loads from a file system that fails.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/faulty_fs.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/hang.h"
#include "tests/support/mounts.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

using testing::GuardedMemory;
using testing::kHang;
using testing::kMiB;
using testing::faulty_fs::kBadOffset;
using testing::faulty_fs::kFileBytes;

class FuseTest : public ::testing::TestWithParam<std::tuple<Backend, CachePolicy>> {
 protected:
  void SetUp() override {
    fs_ = std::make_unique<testing::FaultyFs>(FLASHPACK_FAULTY_FS, dir_ / "fuse");
    if (!fs_->mounted()) GTEST_SKIP() << "FUSE cannot be mounted here";
  }

  LoadRequest request(const std::string& name, GuardedMemory& memory) const {
    return {.files = {{.path = path(name), .extents = {{0, memory.size(), memory.data()}}}},
            .cache = std::get<CachePolicy>(GetParam())};
  }
  std::filesystem::path path(const std::string& name) const { return dir_ / "fuse" / name; }

  static bool right(const GuardedMemory& memory) {
    for (std::size_t i = 0; i < memory.size(); ++i) {
      if (memory.data()[i] != testing::faulty_fs::byte_at(i)) return false;
    }
    return memory.intact();
  }

  // The code of what is thrown; none when nothing is.
  std::error_code load(const std::string& name, std::size_t phase = 0) {
    GuardedMemory memory(kFileBytes, phase);
    try {
      engine_.load(request(name, memory));
      EXPECT_TRUE(right(memory)) << name;
      return {};
    } catch (const Error& error) {
      EXPECT_TRUE(memory.intact());
      EXPECT_EQ(error.path(), path(name));
      error_ = error;
      return error.code();
    }
  }

  testing::TempDir dir_;
  std::unique_ptr<testing::FaultyFs> fs_;
  Engine engine_{{.chunk_bytes = kMiB,
                  .queue_depth = 2,
                  .staging_bytes = 8 * kMiB,
                  .workers = 6,
                  .backend = std::get<Backend>(GetParam())}};
  std::optional<Error> error_;
};

std::string name_of(const ::testing::TestParamInfo<std::tuple<Backend, CachePolicy>>& way) {
  constexpr std::array kPolicies = {"Auto", "Direct", "Buffered"};
  const auto [backend, cache] = way.param;
  return std::string(backend == Backend::kAuto ? "Auto" : "Workers") + kPolicies[static_cast<std::size_t>(cache)];
}

INSTANTIATE_TEST_SUITE_P(Ways, FuseTest,
                         ::testing::Combine(::testing::Values(Backend::kAuto, Backend::kWorkers),
                                            ::testing::Values(CachePolicy::kAuto, CachePolicy::kDirect,
                                                              CachePolicy::kBuffered)),
                         name_of);

TEST_P(FuseTest, ShortReadsAndInterruptionsStillDeliverTheRightBytes) {
  for (const char* name : {"plain", "short", "eintr", "eagain"}) {
    EXPECT_EQ(load(name), std::error_code()) << name << ": " << error_->what();
    EXPECT_EQ(load(name, 64), std::error_code()) << name << ": " << error_->what();
  }
}

TEST_P(FuseTest, AnErrorNamesPathAndOffset) {
  EXPECT_EQ(load("eio"), std::errc::io_error);
  EXPECT_LE(error_->offset_bytes(), kBadOffset);
  EXPECT_GE(error_->offset_bytes() + kMiB, kBadOffset) << "the chunk that holds the bad block";
  EXPECT_NE(std::string(error_->what()).find(path("eio").string() + " at "), std::string::npos) << error_->what();
  EXPECT_EQ(load("plain"), std::error_code()) << "the engine goes on";
}

TEST_P(FuseTest, FilesThatFailLeaveTheOthersAloneIfTheRequestSaysSo) {
  constexpr std::array kFiles = {"eio", "plain", "early", "short"};
  for (const std::size_t phase : {0u, 64u}) {
    std::vector<std::unique_ptr<GuardedMemory>> memory;
    LoadRequest wanted{.cache = std::get<CachePolicy>(GetParam()), .continue_on_error = true};
    for (const char* name : kFiles) {
      memory.push_back(std::make_unique<GuardedMemory>(kFileBytes, phase));
      wanted.files.push_back(request(name, *memory.back()).files.front());
    }
    Transfer transfer = engine_.start_load(wanted);
    ASSERT_TRUE(transfer.wait_for(kHang));
    const std::vector<FileError> errors = transfer.file_errors();
    ASSERT_EQ(errors.size(), 2u) << transfer.error_text();
    EXPECT_TRUE(errors[0].file == 0 && errors[0].error.code() == std::errc::io_error) << errors[0].error.what();
    EXPECT_TRUE(errors[1].file == 2 && errors[1].error.code() == Errc::kTruncated) << errors[1].error.what();
    EXPECT_TRUE(right(*memory[1]) && right(*memory[3]));
    for (const auto& each : memory) EXPECT_TRUE(each->intact());
  }
}

TEST_P(FuseTest, AFileThatEndsBeforeItsSizeIsAShortRead) { EXPECT_EQ(load("early"), Errc::kTruncated); }

TEST_P(FuseTest, AFileThatChangesWhileItIsReadIsAnError) { EXPECT_EQ(load("changing"), Errc::kFileChanged); }

TEST_P(FuseTest, AFileThatDoesNotTellAfterItsReadsWhetherItHasChangedIsAnErrorOfTheSystem) {
  ASSERT_EQ(load("lost"), std::errc::io_error);
  EXPECT_EQ(error_->what(), "stat " + path("lost").string() + ": Input/output error");
}

// What "on time" means is shown by order: the deadline comes and goes while the read is stuck.
TEST_P(FuseTest, AStuckReadHoldsUpNeitherWaitForNorOtherFiles) {
  GuardedMemory stuck_memory(kFileBytes);
  LoadRequest wanted = request("stuck", stuck_memory);
  wanted.deadline = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  Transfer stuck = engine_.start_load(wanted);
  fs_->wait_until_stuck();
  EXPECT_FALSE(stuck.wait_for(std::chrono::milliseconds(2500)));
  EXPECT_GT(stuck.progress().outstanding, 0u);

  // All of the queue depth is stuck; where the workers read, all of them but one.
  const auto other_bytes = testing::random_bytes(3 * kMiB + 5);
  testing::write_file(dir_ / "other", other_bytes);
  GuardedMemory other(other_bytes.size(), 64);
  Transfer second =
      engine_.start_load({.files = {{.path = dir_ / "other", .extents = {{0, other.size(), other.data()}}}},
                          .cache = CachePolicy::kDirect});
  EXPECT_TRUE(second.wait_for(kHang));
  EXPECT_FALSE(stuck.wait_for(std::chrono::nanoseconds(0)));

  fs_->release();
  ASSERT_TRUE(stuck.wait_for(kHang));
  try {
    stuck.wait();
    ADD_FAILURE() << "the deadline has passed";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::kDeadlineExceeded);
  }
  EXPECT_TRUE(stuck_memory.intact());
  EXPECT_TRUE(testing::same_bytes(other.data(), other_bytes.data(), other.size()));
  EXPECT_EQ(load("plain"), std::error_code());
}

TEST_P(FuseTest, ACancelledStuckReadEndsWhenTheFileSystemAnswers) {
  GuardedMemory memory(kFileBytes, 64);
  Transfer transfer = engine_.start_load(request("stuck", memory));
  fs_->wait_until_stuck();
  transfer.cancel();
  fs_->release();
  ASSERT_TRUE(transfer.wait_for(kHang));
  EXPECT_THROW(transfer.wait(), Error);
  EXPECT_TRUE(memory.intact());
}

}  // namespace
}  // namespace flashpack
