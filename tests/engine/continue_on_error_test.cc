// Loads in which a file that fails leaves the others alone.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
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
using testing::kHang;
using testing::kMiB;
using Rig = testing::PipelineRig;

// Keeps what it is told of.
struct Told final : Completion {
  void landed(std::size_t file, std::size_t extent) noexcept override {
    EXPECT_TRUE(extents.emplace(file, extent).second) << "told twice";
    if (then) then(file, extent);
    ++count;
  }
  void done(Transfer& transfer) noexcept override { errors = transfer.file_errors(); }

  std::function<void(std::size_t, std::size_t)> then = {};
  std::set<std::pair<std::size_t, std::size_t>> extents;  // For the driver alone before the end, like `errors`.
  std::vector<FileError> errors;
  std::atomic<std::size_t> count = 0;
};

std::string causes(std::span<const FileError> files) {
  std::string all;
  for (const FileError& each : files) all += std::to_string(each.file) + ": " + each.error.code().message() + "\n";
  return all;
}

std::optional<Error> error_of(Transfer& transfer) {
  if (!transfer.wait_for(kHang)) throw std::runtime_error("the load hangs");
  try {
    transfer.wait();
    return std::nullopt;
  } catch (const Error& error) {
    return error;
  }
}

Checksums checksums_of(std::span<const std::byte> bytes) {
  Checksums sums{.size_bytes = bytes.size()};
  for (std::size_t begin = 0; begin < bytes.size(); begin += Checksums::kStripeBytes)
    sums.crc32c.push_back(
        crc32c(bytes.subspan(begin, std::min<std::size_t>(Checksums::kStripeBytes, bytes.size() - begin))));
  return sums;
}

class ContinueOnErrorTest : public ::testing::TestWithParam<std::tuple<Backend, CachePolicy>> {
 protected:
  static constexpr std::size_t kExtentBytes = 300'000;

  // Adds a file to the request, of which all is wanted, in extents that are no multiple of anything.
  FileExtents& add(std::size_t size_bytes = 3 * kMiB + 77) {
    const std::size_t index = bytes_.size();
    bytes_.push_back(testing::random_bytes(size_bytes, static_cast<unsigned>(index)));
    memory_.push_back(std::make_unique<GuardedMemory>(size_bytes, index % 2 ? 0 : 100));
    FileExtents& file = request_.files.emplace_back(FileExtents{.path = dir_ / std::to_string(index)});
    testing::write_file(file.path, bytes_.back());
    for (std::size_t at = 0; at < size_bytes; at += kExtentBytes)
      file.extents.push_back({at, std::min(kExtentBytes, size_bytes - at), memory_.back()->data() + at});
    return file;
  }

  bool right(std::size_t file) const { return testing::right(*memory_.at(file), bytes_.at(file)); }
  bool right(std::size_t file, std::size_t extent) const {
    const Extent& asked = request_.files.at(file).extents.at(extent);
    return testing::same_bytes(asked.target, bytes_.at(file).data() + asked.offset_bytes, asked.size_bytes);
  }
  // All files that the error does not name have landed, and no other memory was written.
  void expect_others_right(std::span<const FileError> failed) const {
    for (std::size_t file = 0; file < bytes_.size(); ++file) {
      const bool fails = std::ranges::count(failed, file, &FileError::file) > 0;
      EXPECT_TRUE(fails || right(file)) << "file " << file;
      EXPECT_TRUE(memory_[file]->intact());
    }
  }

  // Loads, and expects that one file fails, that its error is the load's, and that all others land.
  Error load_all_but(std::size_t file, std::error_code code) {
    Told told;
    Transfer transfer = engine_.start_load(request_, &told);
    const std::optional<Error> error = error_of(transfer);
    EXPECT_TRUE(error);
    if (!error) return Error({}, "no error");
    EXPECT_EQ(error->code(), code) << error->what();
    EXPECT_EQ(error->files().size(), 1u) << causes(error->files());
    EXPECT_EQ(error->files().front().file, file);
    EXPECT_EQ(error->files().front().error.code(), code);
    EXPECT_EQ(transfer.error(), code);
    EXPECT_EQ(transfer.error_text(), error->what());
    EXPECT_EQ(causes(transfer.file_errors()), causes(error->files()));
    EXPECT_EQ(causes(told.errors), causes(error->files())) << "as the completion sees them";
    expect_others_right(error->files());
    EXPECT_TRUE(transfer.progress().finished);
    EXPECT_EQ(transfer.progress().outstanding, 0u);
    return *error;
  }

  testing::TempDir dir_;
  std::vector<std::vector<std::byte>> bytes_;
  std::vector<std::unique_ptr<GuardedMemory>> memory_;
  LoadRequest request_{.cache = std::get<CachePolicy>(GetParam()), .continue_on_error = true};
  Engine engine_{testing::small_engine(std::get<Backend>(GetParam()))};
};

std::string name_of(const ::testing::TestParamInfo<std::tuple<Backend, CachePolicy>>& way) {
  const auto [backend, cache] = way.param;
  const std::string policy = cache == CachePolicy::kAuto     ? "Auto"
                             : cache == CachePolicy::kDirect ? "Direct"
                                                             : "Buffered";
  return (backend == Backend::kAuto ? "Auto" : "Workers") + policy;
}

INSTANTIATE_TEST_SUITE_P(Ways, ContinueOnErrorTest,
                         ::testing::Combine(::testing::Values(Backend::kAuto, Backend::kWorkers),
                                            ::testing::Values(CachePolicy::kAuto, CachePolicy::kDirect,
                                                              CachePolicy::kBuffered)),
                         name_of);

TEST_P(ContinueOnErrorTest, AFileThatIsMissingLeavesTheOthersAlone) {
  for (std::size_t missing = 0; missing < 3; ++missing) add();
  for (std::size_t missing = 0; missing < 3; ++missing) {
    const std::filesystem::path path = std::exchange(request_.files[missing].path, dir_ / "none");
    const Error error = load_all_but(missing, std::make_error_code(std::errc::no_such_file_or_directory));
    const std::string text = "open " + (dir_ / "none").string() + ": No such file or directory";
    EXPECT_EQ(error.what(), "1 of 3 files failed: " + text);
    EXPECT_EQ(error.path(), dir_ / "none");
    EXPECT_EQ(error.files().front().error.what(), text);
    EXPECT_EQ(error.files().front().error.path(), dir_ / "none");
    EXPECT_TRUE(error.files().front().error.files().empty());
    request_.files[missing].path = path;
  }
}

TEST_P(ContinueOnErrorTest, AFileThatIsTooShortLeavesTheOthersAlone) {
  add();
  add();
  add(kMiB);
  std::filesystem::resize_file(request_.files[1].path, 2 * kMiB + 5);
  load_all_but(1, Errc::kTruncated);
}

TEST_P(ContinueOnErrorTest, AFileThatIsNotTheExpectedOneLeavesTheOthersAlone) {
  add().expected = FileIdentity{};
  add();
  load_all_but(0, Errc::kFileChanged);
}

TEST_P(ContinueOnErrorTest, ADescriptorThatIsNoneLeavesTheOthersAlone) {
  add();
  add().fd = std::numeric_limits<int>::max();
  add();
  load_all_but(1, std::make_error_code(std::errc::bad_file_descriptor));
}

TEST_P(ContinueOnErrorTest, AnOpenFileThatIsTooShortLeavesTheOthersAlone) {
  add();
  add();
  std::filesystem::resize_file(request_.files[0].path, 100);
  for (FileExtents& file : request_.files) file.handle = engine_.open(file.path);
  load_all_but(0, Errc::kTruncated);
}

TEST_P(ContinueOnErrorTest, BytesThatDoNotMatchTheirChecksumLeaveTheOthersAlone) {
  std::vector<Checksums> sums;
  for (std::size_t i = 0; i < 3; ++i) {
    add();
    sums.push_back(checksums_of(bytes_.back()));
  }
  for (std::size_t i = 0; i < 3; ++i) request_.files[i].checksums = &sums[i];
  sums[1].crc32c[2] ^= 1;
  EXPECT_EQ(load_all_but(1, Errc::kCorrupt).offset_bytes(), 2 * kMiB);
  Transfer transfer = engine_.start_load(request_);
  EXPECT_TRUE(error_of(transfer));
  EXPECT_EQ(transfer.stats().verified_bytes, bytes_[0].size() + bytes_[2].size());
}

TEST_P(ContinueOnErrorTest, IfAllFilesFailEachHasItsOwnError) {
  for (int i = 0; i < 3; ++i) add();
  request_.files[0].expected = FileIdentity{};
  request_.files[1].path = dir_ / "none";
  std::filesystem::resize_file(request_.files[2].path, 0);
  Transfer transfer = engine_.start_load(request_);
  const std::optional<Error> error = error_of(transfer);
  ASSERT_TRUE(error);
  EXPECT_EQ(causes(error->files()),
            "0: " + make_error_code(Errc::kFileChanged).message() +
                "\n1: No such file or directory\n2: " + make_error_code(Errc::kTruncated).message() + "\n");
  EXPECT_EQ(error->code(), Errc::kFileChanged) << "of the first of the request";
  EXPECT_TRUE(std::string(error->what()).starts_with("3 of 3 files failed: ")) << error->what();
  expect_others_right(error->files());
}

TEST_P(ContinueOnErrorTest, AnErrorOfTheOnlyFileReadsAsEver) {
  add();
  request_.files[0].path = dir_ / "none";
  EXPECT_EQ(load_all_but(0, std::make_error_code(std::errc::no_such_file_or_directory)).what(),
            "open " + (dir_ / "none").string() + ": No such file or directory");
}

TEST_P(ContinueOnErrorTest, WithoutTheWishTheFirstErrorEndsAllAndNamesNoFiles) {
  request_.continue_on_error = false;
  for (int i = 0; i < 3; ++i) add();
  request_.files[1].path = dir_ / "none";
  Transfer transfer = engine_.start_load(request_);
  const std::optional<Error> error = error_of(transfer);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->what(), "open " + (dir_ / "none").string() + ": No such file or directory");
  EXPECT_TRUE(error->files().empty());
  EXPECT_TRUE(transfer.file_errors().empty());
}

TEST_P(ContinueOnErrorTest, WithoutAnErrorThereIsNone) {
  add();
  add();
  Transfer transfer = engine_.start_load(request_);
  EXPECT_FALSE(error_of(transfer));
  EXPECT_TRUE(transfer.file_errors().empty());
  EXPECT_FALSE(transfer.error());
  expect_others_right({});
  EXPECT_NO_THROW(engine_.load({.continue_on_error = true})) << "of no files";
}

TEST_P(ContinueOnErrorTest, FilesMayFailWhileOthersWaitForTheirTurn) {
  constexpr std::size_t kFiles = 150;
  for (std::size_t file = 0; file < kFiles; ++file) add(file % 10 == 0 ? kMiB + 5 : 5000);
  std::string expected;
  for (std::size_t file = 0; file < kFiles; file += 3) {
    std::filesystem::remove(request_.files[file].path);
    expected += std::to_string(file) + ": No such file or directory\n";
  }
  for (int round = 0; round < 3; ++round) {
    Transfer transfer = engine_.start_load(request_);
    const std::optional<Error> error = error_of(transfer);
    ASSERT_TRUE(error);
    EXPECT_EQ(causes(error->files()), expected);
    EXPECT_TRUE(std::string(error->what()).starts_with("50 of 150 files failed: open ")) << error->what();
    expect_others_right(error->files());
  }
}

TEST_P(ContinueOnErrorTest, OnlyExtentsWithTheirBytesAreToldThoughTheirFileFails) {
  std::vector<Checksums> sums;
  for (std::size_t i = 0; i < 3; ++i) {
    add();
    sums.push_back(checksums_of(bytes_.back()));
  }
  for (std::size_t i = 0; i < 3; ++i) request_.files[i].checksums = &sums[i];
  constexpr std::uint64_t kCorrupt = 2;
  sums[1].crc32c[kCorrupt] ^= 1;
  request_.report_extents = true;
  std::size_t of_failed = 0;
  for (int round = 0; round < 10; ++round) {
    Told told;
    told.then = [&](std::size_t file, std::size_t extent) {
      EXPECT_TRUE(right(file, extent));
      const Extent& landed = request_.files[file].extents[extent];
      const bool in_corrupt_stripe =
          landed.offset_bytes < (kCorrupt + 1) * kMiB && landed.offset_bytes + landed.size_bytes > kCorrupt * kMiB;
      EXPECT_FALSE(file == 1 && in_corrupt_stripe);
      of_failed += file == 1;
    };
    Transfer transfer = engine_.start_load(request_, &told);
    ASSERT_TRUE(error_of(transfer));
    EXPECT_EQ(causes(transfer.file_errors()), "1: " + make_error_code(Errc::kCorrupt).message() + "\n");
    for (const std::size_t file : {0u, 2u}) {
      for (std::size_t extent = 0; extent < request_.files[file].extents.size(); ++extent)
        EXPECT_TRUE(told.extents.contains({file, extent})) << file << ", " << extent;
    }
  }
  EXPECT_GT(of_failed, 0u) << "of the stripes before";
}

// File /0 ends at kFarBytes and the other files begin there, so that an offset says which file is meant.
class ContinueInPipelineTest : public ::testing::TestWithParam<Rig::Shape> {
 protected:
  static constexpr std::uint64_t kFarBytes = 4 * kMiB;

  ContinueInPipelineTest() {
    for (std::size_t i = 0; i < 3; ++i) {
      testing::write_file(dir_ / std::to_string(i), bytes_);
      const std::uint64_t begin = i == 0 ? 0 : kFarBytes;
      memory_.push_back(std::make_unique<GuardedMemory>(kFarBytes, i == 1 ? 8 : 0));
      request_.files.push_back({.path = dir_ / std::to_string(i)});
      for (std::uint64_t at = 0; at < kFarBytes; at += kFarBytes / 8)
        request_.files.back().extents.push_back({begin + at, kFarBytes / 8, memory_.back()->data() + at});
    }
  }

  bool right(std::size_t file, std::size_t extent) const {
    const Extent& asked = request_.files.at(file).extents.at(extent);
    return testing::same_bytes(asked.target, bytes_.data() + asked.offset_bytes, asked.size_bytes);
  }
  bool right(std::size_t file) const {
    for (std::size_t extent = 0; extent < request_.files[file].extents.size(); ++extent) {
      if (!right(file, extent)) return false;
    }
    return memory_[file]->intact();
  }
  void forget() {
    for (const auto& memory : memory_) std::fill_n(memory->data(), memory->size(), std::byte{});
  }

  testing::TempDir dir_;
  std::vector<std::byte> bytes_ = testing::random_bytes(2 * kFarBytes);
  std::vector<std::unique_ptr<GuardedMemory>> memory_;
  LoadRequest request_{.cache = CachePolicy::kDirect, .report_extents = true, .continue_on_error = true};
};

INSTANTIATE_TEST_SUITE_P(Shapes, ContinueInPipelineTest,
                         ::testing::Values(Rig::Shape::kRealWorkers, Rig::Shape::kTwoQueues), [](const auto& shape) {
                           return shape.param == Rig::Shape::kRealWorkers ? "RealWorkers" : "TwoQueues";
                         });

TEST_P(ContinueInPipelineTest, WhicheverChunkCannotBeReadTheOtherFilesLandAndEachSlotIsGivenBack) {
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    if (cache == CachePolicy::kBuffered && GetParam() == Rig::Shape::kRealWorkers)
      continue;  // Their reads do not fail.
    request_.cache = cache;
    for (unsigned chunk = 0; chunk < kFarBytes / kMiB; ++chunk) {
      for (const std::size_t phase : {0u, 8u}) {
        GuardedMemory memory(kFarBytes, phase);
        request_.files[0].extents = {{0, kFarBytes, memory.data()}};
        forget();
        Rig rig(chunk, {.short_percent = 20}, GetParam());
        rig.fail_at(chunk * kMiB + 4711);
        for (int round = 0; round < 2; ++round) {
          Told told;
          Transfer transfer = rig.start_request(request_, &told);
          ASSERT_TRUE(error_of(transfer));
          EXPECT_EQ(causes(transfer.file_errors()), "0: Input/output error\n");
          EXPECT_EQ(transfer.file_errors().front().error.offset_bytes(), chunk * kMiB);
          EXPECT_TRUE(right(1) && right(2) && memory.intact());
          EXPECT_EQ(told.extents.size(), 16u);
        }
        rig.fail_at(bytes_.size());
        Transfer again = rig.start_request(request_);
        EXPECT_FALSE(error_of(again)) << "there are slots for all of it";
        rig.stop();
        EXPECT_TRUE(rig.idle());
      }
    }
  }
}

TEST_P(ContinueInPipelineTest, WhateverTheDiskDoesAFileLandsOrFails) {
  std::size_t landed = 0;
  std::size_t told_of_failed = 0;
  std::map<std::size_t, int> loads;  // By the number of files that failed.
  for (unsigned seed = 0; seed < 80; ++seed) {
    std::mt19937_64 random(seed);
    Rig rig(seed,
            {.short_percent = 20,
             .interrupt_percent = 10,
             .error_percent = seed % 2 ? 2 : 15,
             .refuse_percent = seed % 4 ? 0 : 5},
            GetParam());
    request_.cache = seed % 3 == 0 ? CachePolicy::kBuffered : seed % 3 == 1 ? CachePolicy::kDirect : CachePolicy::kAuto;
    forget();
    Told told;
    Transfer transfer = rig.start_request(request_, &told);
    error_of(transfer);
    rig.stop();
    EXPECT_TRUE(rig.idle());
    const std::vector<FileError> errors = transfer.file_errors();
    EXPECT_EQ(static_cast<bool>(transfer.error()), !errors.empty());
    ++loads[errors.size()];
    for (std::size_t file = 0; file < 3; ++file) {
      const bool failed = std::ranges::count(errors, file, &FileError::file) > 0;
      const auto count = std::ranges::count(told.extents, file, &std::pair<std::size_t, std::size_t>::first);
      EXPECT_TRUE(failed || (right(file) && count == 8)) << "seed " << seed << ", file " << file;
      landed += !failed;
      told_of_failed += failed ? static_cast<std::size_t>(count) : 0;
      EXPECT_TRUE(memory_[file]->intact());
    }
    for (const auto& [file, extent] : told.extents) EXPECT_TRUE(right(file, extent));
  }
  EXPECT_GT(landed, 0u);
  EXPECT_GT(told_of_failed, 0u);
  for (const std::size_t failed : {0u, 1u, 2u}) EXPECT_GT(loads[failed], 0) << failed << " files fail in no load";
}

TEST_P(ContinueInPipelineTest, ACancelAfterAFailureLeavesEachFileItsOwnEnd) {
  Rig rig(1, {}, GetParam());
  rig.get_stuck_from(kFarBytes);
  // So little of an open file has landed as soon as its last extent has.
  internal::FileUse open(internal::File::open(dir_ / "0", std::nullopt, true), &rig.disk());
  request_.files[0].handle = internal::FileUse::handle(std::move(open));
  request_.files[0].extents.resize(2);
  request_.files[1].fd = std::numeric_limits<int>::max();
  Told told;
  Transfer transfer = rig.start_request(request_, &told);
  testing::wait_until([&] { return told.count >= 2; });
  transfer.cancel();
  rig.start({.path = dir_ / "1", .extents = {}}).wait();  // Since then the driver knows of the cancel.
  rig.get_stuck_from(bytes_.size());
  const std::optional<Error> error = error_of(transfer);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), Errc::kCancelled);
  EXPECT_EQ(error->what(), "read " + (dir_ / "0").string() + " and 2 more: cancelled");
  EXPECT_TRUE(error->path().empty()) << "it concerns no single file";
  EXPECT_EQ(causes(error->files()), "1: Bad file descriptor\n2: cancelled\n");
  EXPECT_EQ(error->files()[1].error.path(), dir_ / "2");
  EXPECT_TRUE(right(0));
  EXPECT_EQ(told.extents.size(), 2u) << "nothing is told after the cancel";
}

TEST_P(ContinueInPipelineTest, ADeadlineFailsTheFilesThatHaveNotLanded) {
  Rig rig(1, {}, GetParam());
  rig.get_stuck_from(kFarBytes);
  request_.deadline = std::chrono::steady_clock::now();
  Transfer transfer = rig.start_request(request_);
  rig.get_stuck_from(bytes_.size());
  const std::optional<Error> error = error_of(transfer);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), Errc::kDeadlineExceeded);
  ASSERT_EQ(error->files().size(), 3u);
  for (const FileError& file : error->files()) EXPECT_EQ(file.error.code(), Errc::kDeadlineExceeded);
}

}  // namespace
}  // namespace flashpack
