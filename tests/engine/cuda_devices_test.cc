// One engine of several devices: what they share, and what each has for itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "flashpack/trace.h"
#include "tests/support/bulk.h"
#include "tests/support/device_test.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/spin.h"
#include "tests/support/wait_until.h"

namespace flashpack {
namespace {

using testing::CallersStream;
using testing::cuda;
using testing::error_of;
using testing::GuardedMemory;
using testing::kHang;
using testing::kMiB;

// The engine serves device 1 first and then device 0; device 2 is there, too.
class CudaDevicesTest : public testing::DeviceTest {
 protected:
  static constexpr std::array kServed = {1, 0};

  CudaDevicesTest() {
    engine_.reset();
    cuda().show_devices(3);
    start_engine_of_two();
  }

  EngineOptions options_of_two() const {
    EngineOptions options = this->options();
    options.more_devices = {{Device::Kind::kCuda, kServed[1]}};
    return options;
  }
  void start_engine_of_two() { engine_.emplace(options_of_two()); }

  std::span<const std::byte> bytes(std::uint64_t offset, std::uint64_t size) const {
    return std::span(bytes_).subspan(offset, size);
  }

  std::byte* const on_first_ = cuda().allocate(bytes_.size(), kServed[0]);
  std::byte* const on_second_ = cuda().allocate(bytes_.size(), kServed[1]);
};

INSTANTIATE_TEST_SUITE_P(Backends, CudaDevicesTest, testing::kBackends, testing::backend_name);

// Extents of the file that alternate between the host and two devices, with gaps that one read would cover.
struct Alternating {
  explicit Alternating(std::uint64_t file_bytes, std::byte* on_first, std::byte* on_second) {
    std::mt19937_64 random(5);
    std::array<std::byte*, 3> next = {host.data(), on_first, on_second};
    for (std::uint64_t at = 3; at + 40'000 < file_bytes; at += 1 + random() % 9'000) {
      const std::uint64_t size = 1 + random() % (random() % 8 == 0 ? 40'000 : 4'000);
      const std::size_t place = random() % next.size();
      extents.push_back({at, size, next[place], static_cast<std::uint16_t>(random() % 16 == 0)});
      places.push_back(place);
      next[place] += size;
      at += size;
    }
  }

  void expect_landed(std::span<const std::byte> file) const {
    for (std::size_t i = 0; i < extents.size(); ++i) {
      const auto wanted = file.subspan(extents[i].offset_bytes, extents[i].size_bytes);
      const auto* const target = static_cast<const std::byte*>(extents[i].target);
      const bool landed =
          places[i] == 0 ? testing::same_bytes(wanted.data(), target, wanted.size()) : cuda().holds(target, wanted);
      ASSERT_TRUE(landed) << "extent " << i << " at place " << places[i];
    }
    EXPECT_TRUE(host.intact());
  }

  GuardedMemory host{24 * kMiB};
  std::vector<Extent> extents;
  std::vector<std::size_t> places;  // Of each extent: 0 is the host.
};

TEST_P(CudaDevicesTest, OneRequestHasTargetsOnTheHostAndOnBothDevices) {
  const Alternating alternating(bytes_.size(), on_first_, on_second_);
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered, CachePolicy::kAuto}) {
    for (const bool cold : {true, false}) {
      if (cold) testing::drop_from_cache(path_);
      for (std::byte* const target : {on_first_, on_second_}) cuda().poison(target, bytes_.size());
      const TransferStats stats =
          engine_->load({.files = {{.path = path_, .extents = alternating.extents}}, .cache = cache});
      alternating.expect_landed(bytes_);
      EXPECT_TRUE(stats.pinned);
      EXPECT_EQ(engine_->pinned_bytes(), options().staging_bytes) << "page-locked once for both devices";
      EXPECT_EQ(stats.fallback_reason.find("page-locked"), std::string::npos) << stats.fallback_reason;
    }
  }
  EXPECT_EQ(cuda().pageable_copies(), 0);
}

TEST_P(CudaDevicesTest, TheFirstChunksOfBothDevicesAreInFlightTogether) {
  const std::uint64_t half = 10 * kMiB;
  cuda().hold(true);
  Transfer transfer =
      engine_->start_load({.files = {{.path = path_, .extents = {{0, half, on_second_}, {half, half, on_first_}}}},
                           .cache = CachePolicy::kDirect});
  testing::wait_until(
      [&] { return std::ranges::all_of(kServed, [](int device) { return cuda().copies_under_way(device) > 0; }); });
  cuda().hold(false);
  ASSERT_TRUE(transfer.wait_for(kHang));
  EXPECT_TRUE(cuda().holds(on_second_, bytes(0, half)));
  EXPECT_TRUE(cuda().holds(on_first_, bytes(half, half)));
}

TEST_P(CudaDevicesTest, ATraceTellsTheDeviceOfEachStep) {
  TraceTotals totals;
  EngineOptions traced = options_of_two();
  traced.trace = &totals;
  engine_.reset();
  engine_.emplace(traced);
  GuardedMemory host(3 * kMiB, 77);
  engine_->load({.files = {{.path = path_,
                            .extents = {{0, 5 * kMiB + 1, on_first_},
                                        {6 * kMiB, 8 * kMiB + 2, on_second_},
                                        {16 * kMiB, host.size(), host.data()}}}},
                 .cache = CachePolicy::kDirect});
  engine_.reset();
  const auto copied = [&](std::uint32_t device) {
    return totals.totals_of_devices().at(device)[static_cast<std::size_t>(TraceStage::kCopy)].bytes;
  };
  EXPECT_EQ(copied(0), host.size());
  EXPECT_EQ(copied(1), 5 * kMiB + 1);
  EXPECT_EQ(copied(2), 8 * kMiB + 2);
}

TEST_P(CudaDevicesTest, FilesOfOneRequestMayHaveADeviceEach) {
  const auto other = testing::random_bytes(5 * kMiB + 99);
  testing::write_file(dir_ / "other", other);
  engine_->load({.files = {{.path = path_, .extents = {{0, bytes_.size(), on_second_}}},
                           {.path = dir_ / "other", .extents = {{0, other.size(), on_first_}}}}});
  EXPECT_TRUE(right(on_second_));
  EXPECT_TRUE(cuda().holds(on_first_, other));
}

// A file that both devices and the host have written, and its checksums.
TEST_P(CudaDevicesTest, ChecksumsHoldForAllDevicesInBothDirections) {
  const std::uint64_t first_end = 5 * kMiB + 1234;
  const std::uint64_t second_end = 9 * kMiB + 77;
  cuda().write(on_first_, bytes(0, first_end));
  cuda().write(on_second_, bytes(first_end, second_end - first_end));
  FileWriter writer = engine_->create(dir_ / "new", {.payload_bytes = bytes_.size(), .checksums = true});
  writer.write({.extents = {{0, first_end, on_first_},
                            {first_end, second_end - first_end, on_second_},
                            {second_end, bytes_.size() - second_end, bytes_.data() + second_end}}});
  const Checksums checksums = writer.checksums();
  writer.commit();
  EXPECT_TRUE(testing::file_has(dir_ / "new", bytes_));
  GuardedMemory host(bytes_.size() - second_end);
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    LoadRequest load{.files = {{.path = dir_ / "new",
                                .extents = {{0, first_end, on_second_},
                                            {first_end, second_end - first_end, on_first_},
                                            {second_end, host.size(), host.data()}},
                                .checksums = &checksums}},
                     .cache = cache};
    EXPECT_EQ(engine_->load(load).verified_bytes, bytes_.size());
    EXPECT_TRUE(cuda().holds(on_second_, bytes(0, first_end)));
    Checksums others = checksums;
    others.crc32c[6] ^= 1;
    load.files[0].checksums = &others;
    const auto error = error_of([&] { engine_->load(load); });
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code(), Errc::kCorrupt);
    EXPECT_EQ(error->offset_bytes(), 6 * kMiB);
  }
  const Alternating alternating(bytes_.size(), on_first_, on_second_);
  const TransferStats stats =
      engine_->load({.files = {{.path = dir_ / "new", .extents = alternating.extents, .checksums = &checksums}}});
  alternating.expect_landed(bytes_);
  EXPECT_EQ(stats.verified_bytes, 0u);
  EXPECT_NE(stats.fallback_reason.find("checksums: not verified, one read covers a gap"), std::string::npos)
      << stats.fallback_reason;
}

TEST_P(CudaDevicesTest, AGapBetweenSourcesOfTwoDevicesIsLeftToAnotherWrite) {
  cuda().write(on_first_, bytes_);
  cuda().write(on_second_, bytes_);
  FileWriter writer = engine_->create(dir_ / "new", {});
  writer.write({.extents = {{0, 1000, on_first_}, {1100, 1000, on_second_}, {2100, 7000, on_second_ + 2100}}});
  writer.write({.extents = {{1000, 100, bytes_.data() + 5000}}});
  writer.commit();
  std::vector<std::byte> expected(bytes_.begin(), bytes_.begin() + 9100);
  std::copy_n(bytes_.begin() + 5000, 100, expected.begin() + 1000);
  std::copy_n(bytes_.begin(), 1000, expected.begin() + 1100);
  EXPECT_TRUE(testing::file_has(dir_ / "new", expected));
}

TEST_P(CudaDevicesTest, TheStreamsOfAllDevicesOfARequestComeFirstAndNoOthers) {
  const CallersStream of_first(kServed[0]);
  const CallersStream of_second(kServed[1]);
  const std::uint64_t half = 10 * kMiB;
  for (const CallersStream* busy : {&of_first, &of_second}) {
    for (std::byte* const target : {on_first_, on_second_}) cuda().poison(target, bytes_.size());
    cuda().start_kernel(busy->stream);
    const int touches = cuda().touches(busy->stream);
    LoadRequest both{.files = {{.path = path_, .extents = {{0, half, on_first_}, {half, half, on_second_}}}},
                     .stream = of_first.stream,
                     .more_streams = {of_second.stream}};
    Transfer transfer = engine_->start_load(both);
    EXPECT_EQ(cuda().touches(busy->stream), touches + 1) << "one event, before start_load is back";
    LoadRequest one = request(cuda().allocate(bytes_.size(), busy == &of_first ? kServed[1] : kServed[0]));
    one.stream = of_first.stream;
    one.more_streams = {of_second.stream};
    ASSERT_TRUE(engine_->start_load(one).wait_for(kHang)) << "it has no target on the device that is busy";
    EXPECT_EQ(cuda().touches(busy->stream), touches + 1);
    EXPECT_FALSE(transfer.wait_for(std::chrono::milliseconds(10)));
    EXPECT_TRUE(untouched(on_first_) && untouched(on_second_));
    cuda().end_kernel(busy->stream);
    transfer.wait();
    EXPECT_TRUE(cuda().holds(on_first_, bytes(0, half)) && cuda().holds(on_second_, bytes(half, half)));
  }
}

TEST_P(CudaDevicesTest, AStreamThatIsMissingIsTheLegacyDefaultStreamOfItsDevice) {
  const CallersStream of_first(kServed[0]);
  cuda().start_kernel(nullptr, kServed[1]);
  LoadRequest load = request(on_second_);
  load.stream = of_first.stream;
  Transfer transfer = engine_->start_load(load);
  EXPECT_FALSE(transfer.wait_for(std::chrono::milliseconds(10)));
  EXPECT_TRUE(untouched(on_second_));
  cuda().end_kernel(nullptr, kServed[1]);
  transfer.wait();
  EXPECT_TRUE(right(on_second_));
}

TEST_P(CudaDevicesTest, MemoryOfADeviceThatItDoesNotServeIsRefusedByName) {
  std::byte* const elsewhere = cuda().allocate(bytes_.size(), 2);
  const auto error = error_of([&] { engine_->load(request(elsewhere)); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), Errc::kInvalidArgument);
  EXPECT_NE(std::string(error->what()).find("memory of CUDA device 2 for an engine of devices 1, 0"), std::string::npos)
      << error->what();
  EXPECT_TRUE(untouched(elsewhere));
  EXPECT_FALSE(cuda().has_context(2));
}

TEST_P(CudaDevicesTest, ManagedMemoryBelongsToItsDeviceOrElseToTheFirst) {
  for (const auto& [allocated, copies] : {std::pair{0, 0}, {1, 1}, {2, kServed[0]}}) {
    cudaSetDevice(allocated);
    void* managed = nullptr;
    ASSERT_EQ(cudaMallocManaged(&managed, bytes_.size(), cudaMemAttachGlobal), cudaSuccess);
    cudaSetDevice(0);
    cuda().hold(true);
    Transfer transfer = engine_->start_load(request(static_cast<std::byte*>(managed)));
    testing::wait_until([] { return cuda().copies_under_way(0) + cuda().copies_under_way(1) >= 8; });
    EXPECT_EQ(cuda().copies_under_way(copies), 8) << "allocated on device " << allocated;
    cuda().hold(false);
    transfer.wait();
    EXPECT_TRUE(testing::same_bytes(managed, bytes_.data(), bytes_.size()));
  }
}

TEST_P(CudaDevicesTest, AllDevicesShareTheSlotsWhichAreLockedOnce) {
  EXPECT_EQ(cuda().registrations(), 1);
  cuda().hold(true);
  Transfer to_first = engine_->start_load(request(on_first_));
  Transfer to_second = engine_->start_load(request(on_second_));
  testing::wait_until([] { return cuda().most_copies_under_way() >= 8; });
  EXPECT_FALSE(to_second.wait_for(std::chrono::milliseconds(10)));
  EXPECT_EQ(cuda().most_copies_under_way(), 8) << "as many as there are slots";
  cuda().hold(false);
  to_first.wait();
  to_second.wait();
  EXPECT_TRUE(right(on_first_) && right(on_second_));
  EXPECT_EQ(cuda().pageable_copies(), 0);
  EXPECT_EQ(cuda().calls("cudaHostRegister"), 2) << "once for this engine, and once for the one before it";
}

TEST_P(CudaDevicesTest, WhereMemoryCannotBeLockedLoadsToAllDevicesAreRightAndTheReasonIsTold) {
  engine_.reset();
  cuda().fail("cudaHostRegister", 1, cudaErrorNotSupported);
  start_engine_of_two();
  const Alternating alternating(bytes_.size(), on_first_, on_second_);
  const TransferStats stats = engine_->load({.files = {{.path = path_, .extents = alternating.extents}}});
  alternating.expect_landed(bytes_);
  EXPECT_FALSE(stats.pinned);
  EXPECT_NE(stats.fallback_reason.find("cudaHostRegister"), std::string::npos) << stats.fallback_reason;
}

TEST_P(CudaDevicesTest, StagingThatItsOwnerHasLockedForAllDevicesStaysAsItIs) {
  GuardedMemory staging(8 * kMiB);
  ASSERT_EQ(cudaHostRegister(staging.data(), staging.size(), cudaHostRegisterPortable), cudaSuccess);
  engine_.reset();
  EngineOptions options = options_of_two();
  options.staging_bytes = 0;
  options.staging = {staging.data(), staging.size()};
  engine_.emplace(options);
  const Alternating alternating(bytes_.size(), on_first_, on_second_);
  EXPECT_TRUE(engine_->load({.files = {{.path = path_, .extents = alternating.extents}}}).pinned);
  alternating.expect_landed(bytes_);
  engine_.reset();
  EXPECT_EQ(cuda().registrations(), 1) << "it is the caller's";
  EXPECT_EQ(cuda().pageable_copies(), 0);
  ASSERT_EQ(cudaHostUnregister(staging.data()), cudaSuccess);
}

TEST_P(CudaDevicesTest, ADeviceThatFailsFailsTransfersThatUseItAndNoOthers) {
  for (const std::size_t failed : {0u, 1u}) {
    SCOPED_TRACE(failed);
    engine_.reset();
    cuda().reset();
    cuda().show_devices(3);
    start_engine_of_two();
    std::byte* const there = cuda().allocate(bytes_.size(), kServed[failed]);
    std::byte* const elsewhere = cuda().allocate(bytes_.size(), kServed[1 - failed]);
    cuda().hold(true);
    Transfer to_failed = engine_->start_load(request(there));
    testing::wait_until([&] { return cuda().copies_under_way(kServed[failed]) >= 8; });  // It has all slots.
    Transfer to_other = engine_->start_load(request(elsewhere));
    cuda().fail_context(kServed[failed], cudaErrorIllegalAddress);
    ASSERT_TRUE(to_failed.wait_for(kHang));
    EXPECT_EQ(to_failed.error(), std::error_code(cudaErrorIllegalAddress, cuda_category()));
    cuda().hold(false);
    ASSERT_TRUE(to_other.wait_for(kHang));
    EXPECT_FALSE(to_other.error()) << to_other.error_text();
    EXPECT_TRUE(right(elsewhere));

    const std::error_code refusal = error_of([&] { engine_->load(request(there)); }).value().code();
    EXPECT_EQ(refusal, std::error_code(cudaErrorIllegalAddress, cuda_category()));
    GuardedMemory host(bytes_.size());
    cuda().poison(elsewhere, bytes_.size());
    engine_->load(
        {.files = {{.path = path_, .extents = {{0, 6 * kMiB, elsewhere}, {6 * kMiB, 6 * kMiB, host.data()}}}}});
    EXPECT_TRUE(cuda().holds(elsewhere, bytes(0, 6 * kMiB)));
    EXPECT_TRUE(testing::same_bytes(host.data(), bytes_.data() + 6 * kMiB, 6 * kMiB));
    EXPECT_TRUE(error_of([&] {
      engine_->load({.files = {{.path = path_, .extents = {{0, kMiB, elsewhere}, {kMiB, kMiB, there}}}}});
    })) << "a request of both";
  }
  engine_.reset();
}

TEST_P(CudaDevicesTest, AnEngineEndsQuietlyAfterTheContextOfOneOfItsDevicesHasGone) {
  for (const int lost : kServed) {
    start_engine_of_two();
    engine_->load(request(on_first_));
    cuda().lose_context(lost);
    engine_.reset();
    EXPECT_EQ(cuda().live_streams() + cuda().live_events() + cuda().registrations(), 0);
  }
}

TEST_P(CudaDevicesTest, StartingFailsCleanlyAtEachCallForEachDevice) {
  engine_.reset();
  for (const char* function : {"cudaSetDevice", "cudaGetDriverEntryPoint", "cuCtxGetCurrent", "cuCtxPushCurrent",
                               "cudaEventCreateWithFlags", "cudaStreamCreateWithFlags"}) {
    int failures = 0;
    for (int nth = 1;; ++nth) {
      cuda().fail(function, nth, cudaErrorInsufficientDriver);
      const auto error = error_of([&] { start_engine_of_two(); });
      if (!error) break;
      ++failures;
      const std::string what = error->what();
      EXPECT_NE(what.find("cudaErrorInsufficientDriver"), std::string::npos) << what;
      EXPECT_EQ(cuda().live_streams() + cuda().live_events() + cuda().registrations(), 0) << function << " " << nth;
    }
    EXPECT_GE(failures, 2) << function;
    cuda().fail(function, 1, cudaSuccess);
    engine_.reset();
  }
}

TEST_P(CudaDevicesTest, DevicesThatAreNoneOrTwiceOrNotOfCudaAreRefused) {
  engine_.reset();
  const auto refusal_of = [&](Device first, std::vector<Device> more) {
    EngineOptions options = this->options();
    options.device = first;
    options.more_devices = std::move(more);
    const auto error = error_of([&] { const Engine engine(options); });
    EXPECT_EQ(cuda().registrations(), 0);
    return error ? std::pair(error->code(), std::string(error->what())) : std::pair(std::error_code(), std::string());
  };
  constexpr auto kCuda = Device::Kind::kCuda;
  const auto invalid = [](const std::string& message) {
    return std::pair(make_error_code(Errc::kInvalidArgument), message + ": invalid argument");
  };
  EXPECT_EQ(refusal_of({}, {{kCuda, 1}}), invalid("engine options: more_devices is for CUDA devices alone"));
  EXPECT_EQ(refusal_of({kCuda, 1}, {{kCuda, 0}, {}}),
            invalid("engine options: more_devices is for CUDA devices alone"));
  EXPECT_EQ(refusal_of({kCuda, 1}, {{kCuda, 1}}), invalid("engine options: CUDA device 1 twice"));
  EXPECT_EQ(refusal_of({kCuda, 1}, {{kCuda, 0}, {kCuda, 2}, {kCuda, 0}}),
            invalid("engine options: CUDA device 0 twice"));
  std::vector<Device> many;
  for (int index = 1; index <= 64; ++index) many.push_back({kCuda, index});
  EXPECT_EQ(refusal_of({kCuda, 0}, many), invalid("engine options: more_devices must be at most 63"));
  EXPECT_EQ(refusal_of({kCuda, 1}, {{kCuda, 3}}).first, std::error_code(cudaErrorInvalidDevice, cuda_category()));
}

// Completions run on the driver thread.
struct AsksForDevice final : Completion {
  void done(Transfer&) noexcept override { cudaGetDevice(&device); }
  int device = -1;
};

TEST_P(CudaDevicesTest, CompletionsFindTheFirstDeviceCurrentAndNoContextIsMadeButTheEngines) {
  AsksForDevice asks;
  engine_->start_load(request(on_second_), &asks).wait();
  EXPECT_EQ(asks.device, kServed[0]);
  EXPECT_FALSE(cuda().has_context(2));
}

TEST_P(CudaDevicesTest, HundredsOfRandomLoadsToBothDevicesEndInTheRightBytesOrACleanError) {
  std::mt19937_64 random(13);
  const Alternating alternating(bytes_.size(), on_first_, on_second_);
  int good = 0;
  int failed = 0;
  for (int round = 0; round < 100; ++round) {
    SCOPED_TRACE(round);
    if (round % 10 == 0) testing::drop_from_cache(path_);
    for (std::byte* const target : {on_first_, on_second_}) cuda().poison(target, bytes_.size());
    constexpr std::array kCalls = {"cudaMemcpyAsync", "cudaEventRecord", "cudaEventQuery", "cudaMemcpyBatchAsync"};
    if (random() % 3 == 0)
      cuda().fail(kCalls[random() % kCalls.size()], static_cast<int>(1 + random() % 20), cudaErrorMemoryAllocation);
    constexpr std::array kPolicies = {CachePolicy::kAuto, CachePolicy::kDirect, CachePolicy::kBuffered};
    const auto error = error_of([&] {
      Transfer transfer = engine_->start_load(
          {.files = {{.path = path_, .extents = alternating.extents}}, .cache = kPolicies[random() % 3]});
      testing::spin(std::chrono::microseconds(random() % 150));
      if (random() % 4 == 0) transfer.cancel();
      if (!transfer.wait_for(kHang)) std::abort();
      transfer.wait();
    });
    ++(error ? failed : good);
    if (!error) alternating.expect_landed(bytes_);
    for (const char* call : kCalls) cuda().fail(call, 1, cudaSuccess);
  }
  EXPECT_GT(good, 30);
  EXPECT_GT(failed, 10);
}

}  // namespace
}  // namespace flashpack
