// The device path of the whole engine, on a runtime that does everything late and can be told to fail.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/bulk.h"
#include "tests/support/counted_new.h"
#include "tests/support/device_test.h"
#include "tests/support/fake_cuda.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/sanitizers.h"
#include "tests/support/spin.h"
#include "tests/support/temp_dir.h"
#include "tests/support/wait_until.h"

namespace flashpack {
namespace {

using testing::CallersStream;
using testing::cuda;
using testing::DeviceTest;
using testing::error_of;
using testing::FakeCuda;
using testing::GuardedMemory;
using testing::kHang;
using testing::kMiB;

INSTANTIATE_TEST_SUITE_P(Backends, DeviceTest, testing::kBackends, testing::backend_name);

TEST_P(DeviceTest, EveryRouteBringsTheRightBytesThroughPinnedSlots) {
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered, CachePolicy::kAuto}) {
    for (const bool cold : {true, false}) {
      if (cold) testing::drop_from_cache(path_);
      std::byte* target = cuda().allocate(bytes_.size());
      const TransferStats stats = engine_->load(request(target, cache));
      EXPECT_TRUE(right(target));
      EXPECT_TRUE(stats.pinned);
      EXPECT_GE(stats.staged_bytes, bytes_.size());
    }
  }
  EXPECT_EQ(cuda().pageable_copies(), 0);
}

TEST_P(DeviceTest, ManySmallTensorsArriveInTheirPlacesInBatches) {
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    std::mt19937_64 random(3);
    FileExtents file{.path = path_};
    std::vector<std::pair<std::uint64_t, std::uint64_t>> places;
    std::byte* memory = cuda().allocate(32 * kMiB);
    std::uint64_t used = 0;
    for (std::uint64_t at = 0; at + 9000 < bytes_.size(); at += 1 + random() % 12'000) {
      const std::uint64_t size = 1 + random() % 8000;
      file.extents.push_back({at, size, memory + used});
      places.emplace_back(at, used);
      used += size + random() % 3;
    }
    const TransferStats stats = engine_->load({.files = {file}, .cache = cache});
    for (std::size_t i = 0; i < places.size(); ++i) {
      const auto got = cuda().read(memory + places[i].second, file.extents[i].size_bytes);
      ASSERT_TRUE(testing::same_bytes(got.data(), bytes_.data() + places[i].first, got.size()));
    }
#if CUDART_VERSION >= 12080
    EXPECT_EQ(stats.fallback_reason.find("cudaMemcpyBatchAsync"), std::string::npos) << stats.fallback_reason;
    EXPECT_LT(cuda().calls("cudaMemcpyAsync") + cuda().calls("cudaMemcpyBatchAsync"), 100) << "one per chunk, or so";
#endif
    EXPECT_GT(places.size(), 2000u);
  }
}

TEST_P(DeviceTest, OneRequestMayHaveTargetsOnTheHostAndTheDevice) {
  std::byte* on_device = cuda().allocate(6 * kMiB);
  GuardedMemory in_place(6 * kMiB);
  GuardedMemory odd(100'000, 7);
  engine_->load({.files = {{.path = path_,
                            .extents = {{5, 6 * kMiB, on_device},
                                        {7 * kMiB, in_place.size(), in_place.data()},
                                        {3 * kMiB + 1, odd.size(), odd.data()}}}},
                 .cache = CachePolicy::kDirect});
  const auto got = cuda().read(on_device, 6 * kMiB);
  EXPECT_TRUE(testing::same_bytes(got.data(), bytes_.data() + 5, got.size()));
  EXPECT_TRUE(testing::same_bytes(in_place.data(), bytes_.data() + 7 * kMiB, in_place.size()));
  EXPECT_TRUE(testing::same_bytes(odd.data(), bytes_.data() + 3 * kMiB + 1, odd.size()));
  EXPECT_TRUE(in_place.intact() && odd.intact());
}

TEST_P(DeviceTest, ASlotIsNotUsedAgainBeforeItsCopyHasLandedAndDoneMeansLanded) {
  std::byte* target = cuda().allocate(bytes_.size());
  cuda().hold(true);
  Transfer transfer = engine_->start_load(request(target));
  testing::wait_until([&] { return cuda().most_copies_under_way() >= 8; });  // As many as there are slots.
  EXPECT_FALSE(transfer.wait_for(std::chrono::milliseconds(20)));
  EXPECT_EQ(cuda().most_copies_under_way(), 8);
  EXPECT_TRUE(untouched(target));
  cuda().hold(false);
  transfer.wait();
  EXPECT_TRUE(right(target)) << "a copy found its slot with other bytes";
}

TEST_P(DeviceTest, NothingIsWrittenBeforeTheCallersStreamHasComeThereAndTheStreamIsTouchedOnce) {
  for (const bool legacy : {false, true}) {
    const CallersStream own;
    const cudaStream_t stream = legacy ? nullptr : own.stream;
    std::byte* target = cuda().allocate(bytes_.size());
    cuda().start_kernel(stream);
    const int touches = cuda().touches(stream);
    Transfer transfer = engine_->start_load(request(target, CachePolicy::kDirect, stream));
    EXPECT_EQ(cuda().touches(stream), touches + 1) << "one event, before start_load is back";
    EXPECT_FALSE(transfer.wait_for(std::chrono::milliseconds(20)));
    EXPECT_TRUE(untouched(target));
    cuda().end_kernel(stream);
    transfer.wait();
    EXPECT_TRUE(right(target));
    EXPECT_EQ(cuda().touches(stream), touches + 1);
  }
}

TEST_P(DeviceTest, CancelDeadlineAndDestructionDoNotWaitForTheCallersKernels) {
  const CallersStream stream;
  std::byte* target = cuda().allocate(bytes_.size());
  cuda().start_kernel(stream.stream);  // Never ends while they end.
  Transfer cancelled = engine_->start_load(request(target, CachePolicy::kDirect, stream.stream));
  EXPECT_FALSE(cancelled.wait_for(std::chrono::milliseconds(10)));
  cancelled.cancel();
  ASSERT_TRUE(cancelled.wait_for(kHang));
  LoadRequest late = request(target, CachePolicy::kBuffered, stream.stream);
  late.deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(10);
  Transfer expired = engine_->start_load(late);
  ASSERT_TRUE(expired.wait_for(kHang));
  EXPECT_EQ(error_of([&] { expired.wait(); })->code(), Errc::kDeadlineExceeded);
  {
    const Transfer destroyed = engine_->start_load(request(target, CachePolicy::kDirect, stream.stream));
  }
  EXPECT_TRUE(untouched(target));
  cuda().end_kernel(stream.stream);
  cuda().finish_all();
}

TEST_P(DeviceTest, ATransferThatWaitsForItsStreamDoesNotHoldUpOthers) {
  const CallersStream busy;
  std::byte* waiting_target = cuda().allocate(bytes_.size());
  std::byte* target = cuda().allocate(bytes_.size());
  cuda().start_kernel(busy.stream);
  Transfer waiting = engine_->start_load(request(waiting_target, CachePolicy::kDirect, busy.stream));
  EXPECT_FALSE(waiting.wait_for(std::chrono::milliseconds(10)));
  Transfer other = engine_->start_load(request(target, CachePolicy::kDirect));
  ASSERT_TRUE(other.wait_for(kHang));
  EXPECT_TRUE(right(target));
  EXPECT_TRUE(untouched(waiting_target));
  cuda().end_kernel(busy.stream);
  waiting.wait();
  EXPECT_TRUE(right(waiting_target));
}

TEST_P(DeviceTest, EachCallMayFailOnceAndTheNextLoadIsRight) {
  for (const char* function : {"cudaMemcpyAsync", "cudaEventRecord", "cudaEventQuery", "cudaEventCreateWithFlags",
                               "cudaStreamIsCapturing", "cudaPointerGetAttributes"}) {
    for (int nth = 1; nth <= 6; ++nth) {
      std::byte* target = cuda().allocate(bytes_.size());
      cuda().fail(function, nth, cudaErrorMemoryAllocation);
      const auto error = error_of([&] { engine_->load(request(target, CachePolicy::kDirect)); });
      if (error) {
        EXPECT_EQ(error->code().category(), cuda_category()) << error->what();
        EXPECT_NE(std::string(error->what()).find("cudaErrorMemoryAllocation"), std::string::npos) << error->what();
      } else {
        EXPECT_TRUE(cuda().failure_pending()) << function << " " << nth << " failed and nobody noticed";
      }
      if (cuda().failure_pending()) break;
      engine_->load(request(target, CachePolicy::kDirect));
      EXPECT_TRUE(right(target)) << function << " " << nth;
    }
    cuda().fail(function, 1, cudaSuccess);
  }
}

TEST_P(DeviceTest, AFailureWithCopiesUnderWayIsToldWhenTheyHaveLanded) {
  std::byte* target = cuda().allocate(bytes_.size());
  cuda().hold(true);
  cuda().fail("cudaEventRecord", 2, cudaErrorMemoryAllocation);  // The first is the gate's.
  LoadRequest one_chunk = request(target);
  one_chunk.files[0].extents[0].size_bytes = 1000;
  Transfer transfer = engine_->start_load(one_chunk);
  testing::wait_until([&] { return cuda().most_copies_under_way() > 0; });
  EXPECT_FALSE(transfer.wait_for(std::chrono::milliseconds(20)));
  cuda().hold(false);
  ASSERT_TRUE(transfer.wait_for(kHang));
  EXPECT_EQ(error_of([&] { transfer.wait(); })->code().category(), cuda_category());
}

// Whether the end of copies is asked for again and again, and not made up.
void expect_more_questions(Transfer& transfer) {
  const int questions = cuda().calls("cudaStreamQuery");
  testing::wait_until([&] { return cuda().calls("cudaStreamQuery") >= questions + 20 || transfer.wait_for({}); });
  EXPECT_FALSE(transfer.wait_for({}));
}

TEST_P(DeviceTest, AnErrorOfAQuestionIsNotTakenForTheEndOfACopy) {
  std::byte* target = cuda().allocate(bytes_.size());
  cuda().hold(true);
  Transfer transfer = engine_->start_load(request(target));
  testing::wait_until([&] { return cuda().most_copies_under_way() >= 8; });  // As many as there are slots.
  for (const char* question : {"cudaEventQuery", "cudaStreamQuery"}) {
    cuda().fail(question, 1, cudaErrorMemoryAllocation);
    testing::wait_until([&] { return !cuda().failure_pending() || transfer.wait_for({}); });
  }
  expect_more_questions(transfer);
  EXPECT_EQ(cuda().most_copies_under_way(), 8) << "a slot was used again";
  cuda().hold(false);
  ASSERT_TRUE(transfer.wait_for(kHang));
  EXPECT_EQ(transfer.error(), std::error_code(cudaErrorMemoryAllocation, cuda_category()));
}

TEST_P(DeviceTest, ACopyThatFailedHalfwayHasItsSlotUntilTheRestHasLanded) {
  std::byte* target = cuda().allocate(bytes_.size());
  cuda().hold(true);
  cuda().fail("cudaEventRecord", 2, cudaErrorMemoryAllocation);  // The first is the gate's.
  cuda().fail("cudaStreamQuery", 1, cudaErrorMemoryAllocation, false, 5);
  LoadRequest one_chunk = request(target);
  one_chunk.files[0].extents[0].size_bytes = 1000;
  Transfer transfer = engine_->start_load(one_chunk);
  expect_more_questions(transfer);
  cuda().hold(false);
  ASSERT_TRUE(transfer.wait_for(kHang));
  EXPECT_EQ(transfer.error(), std::error_code(cudaErrorMemoryAllocation, cuda_category()));
}

TEST_P(DeviceTest, ABatchThatIsRefusedIsTriedOnceAndTold) {
  cuda().fail("cudaMemcpyBatchAsync", 1, cudaErrorCallRequiresNewerDriver);
  std::byte* target = cuda().allocate(kMiB);
  for (int load = 0; load < 2; ++load) {
    cuda().poison(target, kMiB);
    const TransferStats stats =
        engine_->load({.files = {{.path = path_, .extents = {{5, 100, target}, {500, 100, target + 200}}}}});
    EXPECT_TRUE(cuda().holds(target, std::span(bytes_).subspan(5, 100)));
    EXPECT_TRUE(cuda().holds(target + 200, std::span(bytes_).subspan(500, 100)));
    EXPECT_TRUE(stats.pinned);
    EXPECT_NE(stats.fallback_reason.find("cudaMemcpyBatchAsync"), std::string::npos) << stats.fallback_reason;
    EXPECT_EQ(cuda().calls("cudaMemcpyBatchAsync"), CUDART_VERSION >= 12080 ? 1 : 0);
  }
}

TEST_P(DeviceTest, CopiesThatMayTakeLongLeaveTheDriverAlone) {
  std::byte* target = cuda().allocate(bytes_.size());
  FileExtents file{.path = path_};
  for (std::uint64_t at = 0; at < kMiB; at += 100) file.extents.push_back({at, 50, target + at});
  engine_->load({.files = {file}});
  EXPECT_FALSE(cuda().called_by("cudaMemcpyBatchAsync", "flashpack-drive"));
  EXPECT_FALSE(cuda().called_by("cudaMemcpyAsync", "flashpack-drive"));
  engine_->load(request(target));
  EXPECT_TRUE(cuda().called_by("cudaMemcpyAsync", "flashpack-drive")) << "what is quick is done at once";
}

TEST_P(DeviceTest, ASingleCopyOfMemoryThatIsNotLockedLeavesTheDriverAlone) {
  engine_.reset();
  cuda().fail("cudaHostRegister", 1, cudaErrorHostMemoryAlreadyRegistered);
  start_engine();
  std::byte* target = cuda().allocate(bytes_.size());
  engine_->load(request(target));
  EXPECT_TRUE(right(target));
  engine_->create(dir_ / "new", {}).write({.extents = {{0, bytes_.size(), target}}});
  EXPECT_TRUE(cuda().called_by("cudaMemcpyAsync", "flashpack-work"));
  EXPECT_FALSE(cuda().called_by("cudaMemcpyAsync", "flashpack-drive"));
}

TEST_P(DeviceTest, AStickyErrorIsNamedByTheTransferAndByAllThatCome) {
  std::byte* target = cuda().allocate(bytes_.size());
  cuda().fail("cudaEventQuery", 5, cudaErrorIllegalAddress, true);
  for (int load = 0; load < 3; ++load) {
    const auto error = error_of([&] { engine_->load(request(target)); });
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->code().category(), cuda_category());
    EXPECT_NE(std::string(error->what()).find("cudaErrorIllegalAddress"), std::string::npos) << error->what();
  }
}

TEST_P(DeviceTest, StartingFailsCleanlyAtEachCall) {
  engine_.reset();
  for (const char* function : {"cudaGetDeviceCount", "cudaSetDevice", "cudaGetDriverEntryPoint", "cuCtxGetCurrent",
                               "cudaEventCreateWithFlags", "cudaStreamCreateWithFlags"}) {
    for (const int nth : {1, 2}) {
      cuda().fail(function, nth, cudaErrorInsufficientDriver);
      const auto error = error_of([&] { start_engine(); });
      if (!error) {
        EXPECT_TRUE(cuda().failure_pending());
        engine_.reset();
        cuda().fail(function, 1, cudaSuccess);
        continue;
      }
      const std::string what = error->what();
      EXPECT_NE(what.find("cudaErrorInsufficientDriver"), std::string::npos) << what;
      EXPECT_EQ(what.find("cudaErrorInsufficientDriver"), what.rfind("cudaErrorInsufficientDriver")) << what;
      EXPECT_EQ(cuda().live_streams() + cuda().live_events() + cuda().registrations(), 0) << function;
    }
  }
}

TEST_P(DeviceTest, MemoryThatCannotBeLockedIsNoErrorAndTold) {
  engine_.reset();
  cuda().fail("cudaHostRegister", 1, cudaErrorMemoryAllocation);
  start_engine();
  std::byte* target = cuda().allocate(bytes_.size());
  const TransferStats stats = engine_->load(request(target));
  EXPECT_TRUE(right(target));
  EXPECT_FALSE(stats.pinned);
  EXPECT_NE(stats.fallback_reason.find("cudaHostRegister"), std::string::npos) << stats.fallback_reason;
  std::byte* small = cuda().allocate(kMiB);
  engine_->load({.files = {{.path = path_, .extents = {{5, 100, small}, {500, 100, small + 200}}}}});
  EXPECT_TRUE(cuda().holds(small + 200, std::span(bytes_).subspan(500, 100)));
}

TEST_P(DeviceTest, AnEngineOfADeviceHasTheThreadsAndSlotsToKeepItsLinkBusy) {
  const Engine engine({.device = {Device::Kind::kCuda, 0}, .backend = GetParam()});
  EXPECT_EQ(engine.options().workers, std::clamp(std::thread::hardware_concurrency(), 2u, 12u));
  EXPECT_EQ(engine.options().staging_bytes, 96 * kMiB);
}

TEST_P(DeviceTest, AnEngineOfTheHostCallsNothingOfCuda) {
  const int calls = cuda().all_calls();
  Engine host({.chunk_bytes = kMiB, .staging_bytes = 4 * kMiB, .backend = GetParam()});
  GuardedMemory memory(bytes_.size());
  host.load({.files = {{.path = path_, .extents = {{0, memory.size(), memory.data()}}}}});
  EXPECT_EQ(cuda().all_calls(), calls);
}

// Completions run on the driver thread.
struct Count final : Completion {
  explicit Count(bool on) : on_(on) {}
  void done(Transfer&) noexcept override { testing::count_allocations(on_); }
  const bool on_;
};

TEST_P(DeviceTest, TheLoopAllocatesNothingPerChunk) {
  if (testing::kSanitizer) GTEST_SKIP() << "the sanitizers have their own operator new";
  std::byte* target = cuda().allocate(bytes_.size());
  const auto allocations_of = [&](std::uint64_t size) {
    Count on(true);
    Count off(false);
    engine_->start_load({}, &on).wait();
    const int before = testing::counted_allocations();
    engine_->load({.files = {{.path = path_, .extents = {{0, size, target}}}}, .cache = CachePolicy::kDirect});
    const int count = testing::counted_allocations() - before;
    engine_->start_load({}, &off).wait();
    return count;
  };
  allocations_of(bytes_.size());
  const int few_chunks = allocations_of(2 * kMiB);
  const int many_chunks = allocations_of(bytes_.size());
  EXPECT_LE(many_chunks, few_chunks + 2) << "2 chunks and 21";
}

TEST_P(DeviceTest, StoresComeFromTheDeviceWhenItsStreamHasWrittenThem) {
  const CallersStream stream;
  std::byte* device = cuda().allocate(bytes_.size());
  GuardedMemory host(3 * kMiB + 5);
  std::memset(host.data(), 7, host.size());
  engine_->load(request(cuda().allocate(bytes_.size())));  // Slots hold old bytes, which must not fill the gaps.
  std::vector<SourceExtent> extents{{0, 5 * kMiB + 3, device},
                                    {5 * kMiB + 10, 100, device + 6 * kMiB},
                                    {5 * kMiB + 120, 200, device + 7 * kMiB},
                                    {8 * kMiB, host.size(), host.data()}};
  FileWriter writer = engine_->create(dir_ / "new", {.payload_bytes = 12 * kMiB});
  cuda().start_kernel(stream.stream);
  Transfer transfer = writer.start_write({.extents = extents, .stream = stream.stream});
  EXPECT_FALSE(transfer.wait_for(std::chrono::milliseconds(10)));
  cuda().write(device, bytes_);  // What the kernel computes.
  cuda().end_kernel(stream.stream);
  transfer.wait();
  writer.commit();
  std::vector<std::byte> expected(12 * kMiB);
  std::copy_n(bytes_.begin(), 5 * kMiB + 3, expected.begin());
  std::copy_n(bytes_.begin() + 6 * kMiB, 100, expected.begin() + 5 * kMiB + 10);
  std::copy_n(bytes_.begin() + 7 * kMiB, 200, expected.begin() + 5 * kMiB + 120);
  std::fill_n(expected.begin() + 8 * kMiB, host.size(), std::byte{7});
  EXPECT_TRUE(testing::file_has(dir_ / "new", expected));
}

TEST_P(DeviceTest, WhatLiesBetweenTensorsOfADeviceIsZeros) {
  std::byte* device = cuda().allocate(bytes_.size());
  cuda().write(device, bytes_);
  engine_->load(request(cuda().allocate(bytes_.size())));  // Slots hold old bytes.
  std::vector<SourceExtent> extents;
  std::vector<std::byte> expected(3 * kMiB);
  for (std::uint64_t at = 100; at + 5000 < expected.size(); at += 5100) {
    extents.push_back({at, 5000, device + at / 3});
    std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(at / 3), 5000,
                expected.begin() + static_cast<std::ptrdiff_t>(at));
  }
  FileWriter writer = engine_->create(dir_ / "new", {.payload_bytes = expected.size()});
  const TransferStats stats = writer.write({.extents = extents});
  writer.commit();
  EXPECT_TRUE(testing::file_has(dir_ / "new", expected));
  EXPECT_GT(stats.direct_bytes, 2 * kMiB) << stats.fallback_reason;
}

TEST_P(DeviceTest, AGapBetweenTensorsOfHostAndDeviceIsLeftToAnotherWrite) {
  std::byte* device = cuda().allocate(bytes_.size());
  cuda().write(device, bytes_);
  FileWriter writer = engine_->create(dir_ / "new", {});
  writer.write({.extents = {{0, 1000, device}, {1100, 1000, bytes_.data()}}});
  writer.write({.extents = {{1000, 100, bytes_.data() + 5000}}});
  writer.commit();
  std::vector<std::byte> expected(2100);
  std::copy_n(bytes_.begin(), 1000, expected.begin());
  std::copy_n(bytes_.begin() + 5000, 100, expected.begin() + 1000);
  std::copy_n(bytes_.begin(), 1000, expected.begin() + 1100);
  EXPECT_TRUE(testing::file_has(dir_ / "new", expected));
}

TEST_P(DeviceTest, ChecksumsHoldFromDeviceToDevice) {
  std::byte* device = cuda().allocate(bytes_.size());
  cuda().write(device, bytes_);
  FileWriter writer = engine_->create(dir_ / "new", {.payload_bytes = bytes_.size(), .checksums = true});
  writer.write({.extents = {{5, bytes_.size() - 5, device}}});
  const Checksums checksums = writer.checksums();
  writer.commit();
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    std::byte* target = cuda().allocate(bytes_.size());
    LoadRequest load{
        .files = {{.path = dir_ / "new", .extents = {{0, bytes_.size(), target}}, .checksums = &checksums}},
        .cache = cache};
    EXPECT_EQ(engine_->load(load).verified_bytes, bytes_.size());
    Checksums others = checksums;
    others.crc32c[1] ^= 1;
    load.files[0].checksums = &others;
    const auto error = error_of([&] { engine_->load(load); });
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->code(), Errc::kCorrupt);
    EXPECT_EQ(error->offset_bytes(), kMiB);
  }
}

TEST_P(DeviceTest, AStoreThatFailsOrIsCancelledLeavesNothing) {
  std::byte* device = cuda().allocate(bytes_.size());
  {
    FileWriter writer = engine_->create(dir_ / "new", {});
    cuda().fail("cudaEventQuery", 4, cudaErrorMemoryAllocation);
    EXPECT_TRUE(error_of([&] { writer.write({.extents = {{0, bytes_.size(), device}}}); }).has_value());
    cuda().fail("cudaEventQuery", 1, cudaSuccess);
  }
  {
    const CallersStream stream;
    cuda().start_kernel(stream.stream);
    FileWriter writer = engine_->create(dir_ / "new", {});
    Transfer transfer = writer.start_write({.extents = {{0, bytes_.size(), device}}, .stream = stream.stream});
    transfer.cancel();
    ASSERT_TRUE(transfer.wait_for(kHang));
    cuda().end_kernel(stream.stream);
    cuda().finish_all();
  }
  EXPECT_FALSE(std::filesystem::exists(dir_ / "new"));
}

TEST_P(DeviceTest, HundredsOfRandomLoadsEndInTheRightBytesOrACleanError) {
  std::mt19937_64 random(11);
  int good = 0;
  int failed = 0;
  std::byte* target = cuda().allocate(bytes_.size());
  for (int round = 0; round < 150; ++round) {
    SCOPED_TRACE(round);
    if (round % 10 == 0) testing::drop_from_cache(path_);
    cuda().poison(target, bytes_.size());
    const CallersStream stream;
    const bool kernel = random() % 4 == 0;
    if (kernel) cuda().start_kernel(stream.stream);
    if (random() % 4 == 0) {
      constexpr std::array kCalls = {"cudaMemcpyAsync", "cudaEventRecord", "cudaEventQuery"};
      cuda().fail(kCalls[random() % kCalls.size()], static_cast<int>(1 + random() % 20), cudaErrorMemoryAllocation);
    }
    constexpr std::array kPolicies = {CachePolicy::kAuto, CachePolicy::kDirect, CachePolicy::kBuffered};
    const auto error = error_of([&] {
      Transfer transfer = engine_->start_load(request(target, kPolicies[random() % 3], stream.stream));
      testing::spin(std::chrono::microseconds(random() % 150));
      if (kernel) cuda().end_kernel(stream.stream);
      if (random() % 4 == 0) transfer.cancel();
      if (!transfer.wait_for(kHang)) std::abort();
      transfer.wait();
    });
    if (kernel && error && error->code() != Errc::kCancelled) cuda().finish_all();
    cuda().finish_all();
    ++(error ? failed : good);
    if (!error) {
      EXPECT_TRUE(right(target));
    }
    for (const char* call : {"cudaMemcpyAsync", "cudaEventRecord", "cudaEventQuery"}) cuda().fail(call, 1, cudaSuccess);
  }
  EXPECT_GT(good, 40);
  EXPECT_GT(failed, 15);
}

}  // namespace
}  // namespace flashpack
