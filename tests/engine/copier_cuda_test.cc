// The device path of the whole engine, on a runtime that does everything late and can be told to fail.
#include <fcntl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "flashpack/engine.h"
#include "tests/support/counted_new.h"
#include "tests/support/fake_cuda.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/temp_dir.h"

namespace flashpack {
namespace {

using testing::FakeCuda;
using testing::GuardedMemory;

constexpr std::uint32_t kMiB = 1u << 20;
constexpr std::chrono::seconds kHang{60};

FakeCuda& cuda() { return FakeCuda::get(); }

// A stream as a caller has them, on the engine's device.
struct CallersStream {
  CallersStream() {
    cudaSetDevice(1);
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaSetDevice(0);
  }
  ~CallersStream() { cudaStreamDestroy(stream); }
  cudaStream_t stream = nullptr;
};

class DeviceTest : public ::testing::TestWithParam<Backend> {
 protected:
  DeviceTest() {
    cuda().reset();
    testing::write_file(path_, bytes_);
    start_engine();
  }
  ~DeviceTest() override {
    engine_.reset();
    EXPECT_EQ(cuda().live_streams(), 0);
    EXPECT_EQ(cuda().live_events(), 0);
    EXPECT_EQ(cuda().registrations(), 0);
  }

  EngineOptions options() const {
    return {.device = {Device::Kind::kCuda, 1},
            .chunk_bytes = kMiB,
            .queue_depth = 4,
            .staging_bytes = 8 * kMiB,
            .workers = 2,
            .backend = GetParam()};
  }
  void start_engine() { engine_.emplace(options()); }

  LoadRequest request(std::byte* target, CachePolicy cache = CachePolicy::kDirect,
                      cudaStream_t stream = nullptr) const {
    return {.files = {{.path = path_, .extents = {{0, bytes_.size(), target}}}}, .cache = cache, .stream = stream};
  }

  bool right(const std::byte* target) const { return cuda().holds(target, bytes_); }
  bool untouched(const std::byte* target) const {
    const auto all = cuda().read(target, bytes_.size());
    return std::all_of(all.begin(), all.end(), [](std::byte byte) { return byte == FakeCuda::kPoison; });
  }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "model";
  std::vector<std::byte> bytes_ = testing::random_bytes(20 * kMiB + 1234);
  std::optional<Engine> engine_;
};

INSTANTIATE_TEST_SUITE_P(Backends, DeviceTest, ::testing::Values(Backend::kAuto, Backend::kWorkers),
                         [](const auto& backend) { return backend.param == Backend::kAuto ? "Auto" : "Workers"; });

template <class Call>
std::optional<Error> error_of(Call call) {
  try {
    call();
    return std::nullopt;
  } catch (const Error& error) {
    return error;
  }
}

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
    engine_->load({.files = {file}, .cache = cache});
    for (std::size_t i = 0; i < places.size(); ++i) {
      const auto got = cuda().read(memory + places[i].second, file.extents[i].size_bytes);
      ASSERT_EQ(std::memcmp(got.data(), bytes_.data() + places[i].first, got.size()), 0);
    }
#if CUDART_VERSION >= 13000
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
  EXPECT_EQ(std::memcmp(got.data(), bytes_.data() + 5, got.size()), 0);
  EXPECT_EQ(std::memcmp(in_place.data(), bytes_.data() + 7 * kMiB, in_place.size()), 0);
  EXPECT_EQ(std::memcmp(odd.data(), bytes_.data() + 3 * kMiB + 1, odd.size()), 0);
  EXPECT_TRUE(in_place.intact() && odd.intact());
}

TEST_P(DeviceTest, ASlotIsNotUsedAgainBeforeItsCopyHasLandedAndDoneMeansLanded) {
  std::byte* target = cuda().allocate(bytes_.size());
  cuda().hold(true);
  Transfer transfer = engine_->start_load(request(target));
  while (cuda().most_copies_under_way() < 8) std::this_thread::yield();  // As many as there are slots.
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

TEST_P(DeviceTest, TheCallersCurrentDeviceIsLeftAlone) {
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  engine_->load(request(cuda().allocate(bytes_.size())));
  int device = -1;
  cudaGetDevice(&device);
  EXPECT_EQ(device, 0) << "the engine is on device 1";
}

TEST_P(DeviceTest, EachCallMayFailOnceAndTheNextLoadIsRight) {
  for (const char* function : {"cudaMemcpyAsync", "cudaEventRecord", "cudaEventQuery", "cudaEventCreateWithFlags",
                               "cudaSetDevice", "cudaGetDevice"}) {
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
    cuda().fail(function, 1 << 30, cudaSuccess);
  }
}

TEST_P(DeviceTest, AFailureWithCopiesUnderWayIsToldWhenTheyHaveLanded) {
  std::byte* target = cuda().allocate(bytes_.size());
  cuda().hold(true);
  cuda().fail("cudaEventRecord", 2, cudaErrorMemoryAllocation);  // The first is the gate's.
  LoadRequest one_chunk = request(target);
  one_chunk.files[0].extents[0].size_bytes = 1000;
  Transfer transfer = engine_->start_load(one_chunk);
  while (cuda().most_copies_under_way() == 0) std::this_thread::yield();
  EXPECT_FALSE(transfer.wait_for(std::chrono::milliseconds(20)));
  cuda().hold(false);
  ASSERT_TRUE(transfer.wait_for(kHang));
  EXPECT_EQ(error_of([&] { transfer.wait(); })->code().category(), cuda_category());
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
  for (const char* function :
       {"cudaGetDeviceCount", "cudaSetDevice", "cudaEventCreateWithFlags", "cudaStreamCreateWithFlags"}) {
    for (const int nth : {1, 2}) {
      cuda().fail(function, nth, cudaErrorInsufficientDriver);
      const auto error = error_of([&] { start_engine(); });
      if (!error) {
        EXPECT_TRUE(cuda().failure_pending());
        engine_.reset();
        cuda().fail(function, 1 << 30, cudaSuccess);
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

TEST_P(DeviceTest, MemoryOfAnotherDeviceIsRefused) {
  std::byte* elsewhere = cuda().allocate(bytes_.size(), 0);
  const auto error = error_of([&] { engine_->load(request(elsewhere)); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), Errc::kInvalidArgument) << error->what();
  EXPECT_TRUE(untouched(elsewhere));
}

TEST_P(DeviceTest, ADeviceThatIsCurrentAlreadyIsNotSetAgain) {
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  const int calls = cuda().calls("cudaSetDevice");
  engine_->load(request(cuda().allocate(bytes_.size())));
  EXPECT_EQ(cuda().calls("cudaSetDevice"), calls);
  cudaSetDevice(0);
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
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "the sanitizers have their own operator new";
#endif
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
  Transfer transfer = writer.start_write(extents, nullptr, stream.stream);
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
  EXPECT_EQ(testing::read_file(dir_ / "new"), expected);
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
  const TransferStats stats = writer.write(extents);
  writer.commit();
  EXPECT_EQ(testing::read_file(dir_ / "new"), expected);
  EXPECT_GT(stats.direct_bytes, 2 * kMiB) << stats.fallback_reason;
}

TEST_P(DeviceTest, ChecksumsHoldFromDeviceToDevice) {
  std::byte* device = cuda().allocate(bytes_.size());
  cuda().write(device, bytes_);
  FileWriter writer = engine_->create(dir_ / "new", {.payload_bytes = bytes_.size(), .checksums = true});
  writer.write({{5, bytes_.size() - 5, device}});
  const Checksums checksums = writer.checksums();
  writer.commit();
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    std::byte* target = cuda().allocate(bytes_.size());
    LoadRequest load{.files = {{.path = dir_ / "new", .extents = {{0, bytes_.size(), target}}, .checksums = checksums}},
                     .cache = cache};
    EXPECT_EQ(engine_->load(load).verified_bytes, bytes_.size());
    load.files[0].checksums->crc32c[1] ^= 1;
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
    EXPECT_TRUE(error_of([&] { writer.write({{0, bytes_.size(), device}}); }).has_value());
    cuda().fail("cudaEventQuery", 1 << 30, cudaSuccess);
  }
  {
    const CallersStream stream;
    cuda().start_kernel(stream.stream);
    FileWriter writer = engine_->create(dir_ / "new", {});
    Transfer transfer = writer.start_write({{0, bytes_.size(), device}}, nullptr, stream.stream);
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
      for (auto n = random() % 300; n > 0; --n) std::this_thread::yield();
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
    for (const char* call : {"cudaMemcpyAsync", "cudaEventRecord", "cudaEventQuery"})
      cuda().fail(call, 1 << 30, cudaSuccess);
  }
  EXPECT_GT(good, 40);
  EXPECT_GT(failed, 15);
}

}  // namespace
}  // namespace flashpack
