// The rest of a process that uses CUDA: other devices, other memory, other users of the same context.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <span>
#include <thread>

#include "tests/support/bulk.h"
#include "tests/support/device_test.h"
#include "tests/support/guarded_memory.h"
#include "tests/support/sanitizers.h"
#include "tests/support/wait_until.h"

namespace flashpack {
namespace {

using testing::cuda;
using testing::error_of;
using testing::kHang;
using testing::kMiB;

class CudaWorldTest : public testing::DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Backends, CudaWorldTest, testing::kBackends, testing::backend_name);

TEST_P(CudaWorldTest, NoContextIsMadeButTheEngines) {
  testing::GuardedMemory memory(bytes_.size());
  std::byte* target = cuda().allocate(bytes_.size());
  engine_->load(request(target));
  engine_->load(request(memory.data()));
  engine_->create(dir_ / "new", {}).write({.extents = {{0, bytes_.size(), target}}});
  Transfer cancelled = engine_->start_load(request(target));
  cancelled.cancel();
  EXPECT_TRUE(cancelled.wait_for(kHang));
  std::thread([&] { engine_->load(request(target)); }).join();
  engine_.reset();
  EXPECT_TRUE(cuda().has_context(1));
  EXPECT_FALSE(cuda().has_context(0));
  int device = -1;
  EXPECT_EQ(cudaGetDevice(&device), cudaSuccess);
  EXPECT_EQ(device, 0);
  cudaStreamCaptureMode mode = cudaStreamCaptureModeThreadLocal;
  EXPECT_EQ(cudaThreadExchangeStreamCaptureMode(&mode), cudaSuccess);
  EXPECT_EQ(mode, cudaStreamCaptureModeGlobal);
}

TEST_P(CudaWorldTest, AnEventThatCannotBeRecordedIsGivenBackInTheContextOfTheEngine) {
  std::byte* target = cuda().allocate(bytes_.size());
  std::thread([&] {
    cuda().fail("cudaEventRecord", 1, cudaErrorInvalidResourceHandle);
    EXPECT_TRUE(error_of([&] { engine_->load(request(target)); }));
  }).join();
  EXPECT_FALSE(cuda().has_context(0));
  engine_->load(request(target));
  EXPECT_TRUE(right(target));
}

TEST_P(CudaWorldTest, OptionsOfAnEngineMakeAnotherOne) {
  const Engine another(engine_->options());
  EXPECT_EQ(another.options().numa_node, engine_->options().numa_node);
}

TEST_P(CudaWorldTest, MemoryOfAnotherDeviceIsRefused) {
  std::byte* elsewhere = cuda().allocate(bytes_.size(), 0);
  const auto error = error_of([&] { engine_->load(request(elsewhere)); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), Errc::kInvalidArgument) << error->what();
  EXPECT_TRUE(untouched(elsewhere));
}

TEST_P(CudaWorldTest, TheCallersCurrentDeviceIsLeftAlone) {
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  engine_->load(request(cuda().allocate(bytes_.size())));
  int device = -1;
  cudaGetDevice(&device);
  EXPECT_EQ(device, 0) << "the engine is on device 1";
}

TEST_P(CudaWorldTest, ADeviceThatIsCurrentAlreadyIsNotSetAgain) {
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  const int calls = cuda().calls("cudaSetDevice");
  engine_->load(request(cuda().allocate(bytes_.size())));
  EXPECT_EQ(cuda().calls("cudaSetDevice"), calls);
  cudaSetDevice(0);
}

TEST_P(CudaWorldTest, MemoryOfEveryKindIsATarget) {
  cudaSetDevice(1);
  void* managed = nullptr;
  ASSERT_EQ(cudaMallocManaged(&managed, bytes_.size(), cudaMemAttachGlobal), cudaSuccess);
  TransferStats stats = engine_->load(request(static_cast<std::byte*>(managed)));
  EXPECT_TRUE(testing::same_bytes(managed, bytes_.data(), bytes_.size()));
  EXPECT_GE(stats.staged_bytes, bytes_.size()) << "not by the CPU, which would take it away from the device";

  // Managed memory belongs to the device that was current when it was allocated. The engine copies to it on a stream
  // of another device, because such a copy moves the memory as well.
  cudaSetDevice(0);
  ASSERT_EQ(cudaMallocManaged(&managed, bytes_.size(), cudaMemAttachGlobal), cudaSuccess);
  engine_->load(request(static_cast<std::byte*>(managed)));
  EXPECT_TRUE(testing::same_bytes(managed, bytes_.data(), bytes_.size()));

  testing::GuardedMemory registered(bytes_.size());
  ASSERT_EQ(cudaHostRegister(registered.data(), registered.size(), cudaHostRegisterDefault), cudaSuccess);
  stats = engine_->load(request(registered.data()));
  EXPECT_TRUE(testing::same_bytes(registered.data(), bytes_.data(), bytes_.size()));
  EXPECT_LT(stats.staged_bytes, kMiB) << "in place";
  ASSERT_EQ(cudaHostUnregister(registered.data()), cudaSuccess);

  std::byte* const mapped = cuda().allocate_mapped({2 * kMiB, 2 * kMiB, 18 * kMiB});  // Expandable segments.
  engine_->load(request(mapped));
  EXPECT_TRUE(right(mapped));
  FileExtents over_the_seam{.path = path_};
  for (std::uint64_t at = kMiB; at < 3 * kMiB; at += 3000) over_the_seam.extents.push_back({at, 3000, mapped + at});
  cuda().poison(mapped, bytes_.size());
  engine_->load({.files = {over_the_seam}});
  EXPECT_TRUE(cuda().holds(mapped + kMiB, std::span(bytes_).subspan(kMiB, 2 * kMiB)));
}

TEST_P(CudaWorldTest, EnginesOfTwoDevicesLoadAtOnce) {
  EngineOptions other = options();
  other.device.index = 0;
  Engine engine_of_0(other);
  std::byte* const on_0 = cuda().allocate(bytes_.size(), 0);
  std::byte* const on_1 = cuda().allocate(bytes_.size(), 1);
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
    cuda().poison(on_0, bytes_.size());
    cuda().poison(on_1, bytes_.size());
    cuda().hold(true);
    Transfer to_0 = engine_of_0.start_load(request(on_0, cache));
    Transfer to_1 = engine_->start_load(request(on_1, cache));
    testing::wait_until([&] { return cuda().copies_under_way(0) >= 8 && cuda().copies_under_way(1) >= 8; });
    cuda().hold(false);
    to_0.wait();
    to_1.wait();
    EXPECT_TRUE(right(on_0) && right(on_1));
  }
  // A context that has failed takes no other with it.
  cuda().fail("cudaEventRecord", 2, cudaErrorIllegalAddress, true);
  EXPECT_TRUE(error_of([&] { engine_->load(request(on_1)); }));
  EXPECT_TRUE(error_of([&] { engine_->load(request(on_1)); }));
  cuda().poison(on_0, bytes_.size());
  engine_of_0.load(request(on_0));
  EXPECT_TRUE(right(on_0));
}

TEST_P(CudaWorldTest, AnEngineOfOneDeviceEndsWhileAnotherCopies) {
  EngineOptions other = options();
  other.device.index = 0;
  std::optional<Engine> engine_of_0(other);
  std::byte* const on_0 = cuda().allocate(bytes_.size(), 0);
  std::byte* const on_1 = cuda().allocate(bytes_.size(), 1);
  engine_of_0->load(request(on_0));
  cuda().hold(true);
  Transfer to_1 = engine_->start_load(request(on_1));
  testing::wait_until([&] { return cuda().copies_under_way(1) >= 8; });
  engine_of_0.reset();
  EXPECT_EQ(cuda().copies_under_way(1), 8);
  EXPECT_EQ(cuda().registrations(), 1);
  cuda().hold(false);
  to_1.wait();
  EXPECT_TRUE(right(on_1));
}

// As a process sees a slice of a device (MIG): a single device, whose number is 0.
TEST_P(CudaWorldTest, TheOnlyDeviceThereIsHasAnEngineAndTheNextNumberIsAnError) {
  engine_.reset();
  cuda().show_devices(1);
  const auto error = error_of([&] { start_engine(); });
  ASSERT_TRUE(error) << "an engine of device 1";
  EXPECT_EQ(error->code(), std::error_code(cudaErrorInvalidDevice, cuda_category())) << error->what();
  EXPECT_FALSE(cuda().has_context(0));
  EngineOptions first = options();
  first.device.index = 0;
  engine_.emplace(first);
  std::byte* const target = cuda().allocate(bytes_.size(), 0);
  engine_->load(request(target));
  EXPECT_TRUE(right(target));
}

TEST_P(CudaWorldTest, ADeviceWithoutAPlaceOnTheBusHasAnEngine) {
  engine_.reset();
  cuda().fail("cudaDeviceGetPCIBusId", 1, cudaErrorNotSupported);
  start_engine();
  EXPECT_FALSE(cuda().failure_pending());
  std::byte* const target = cuda().allocate(bytes_.size());
  engine_->load(request(target));
  EXPECT_TRUE(right(target));
}

// As under WSL, in containers, and where somebody has registered the same addresses before.
TEST_P(CudaWorldTest, WhereMemoryCannotBeLockedLoadsAndStoresAreRightAndTheReasonIsTold) {
  for (const auto& [refusal, name] : {std::pair{cudaErrorNotSupported, "cudaErrorNotSupported"},
                                      {cudaErrorOperatingSystem, "cudaErrorOperatingSystem"},
                                      {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered"}}) {
    engine_.reset();
    cuda().fail("cudaHostRegister", 1, refusal);
    start_engine();
    std::byte* const target = cuda().allocate(bytes_.size());
    for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
      cuda().poison(target, bytes_.size());
      const TransferStats stats = engine_->load(request(target, cache));
      EXPECT_TRUE(right(target));
      EXPECT_FALSE(stats.pinned);
      EXPECT_EQ(engine_->pinned_bytes(), 0u);
      EXPECT_NE(stats.fallback_reason.find(name), std::string::npos) << stats.fallback_reason;
    }
    FileWriter writer = engine_->create(dir_ / "new", {.payload_bytes = bytes_.size()});
    writer.write({.extents = {{0, bytes_.size(), target}}});
    writer.commit();
    EXPECT_TRUE(testing::file_has(dir_ / "new", bytes_));
  }
}

class CallersStagingTest : public CudaWorldTest {
 protected:
  void start_engine_there() {
    engine_.reset();
    EngineOptions there = options();
    there.staging_bytes = 0;
    there.staging = {staging_.data(), staging_.size()};
    engine_.emplace(there);
  }
  TransferStats load_and_check() {
    std::byte* const target = cuda().allocate(bytes_.size());
    TransferStats stats;
    for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered}) {
      cuda().poison(target, bytes_.size());
      stats = engine_->load(request(target, cache));
      EXPECT_TRUE(right(target));
    }
    return stats;
  }

  testing::GuardedMemory staging_{8 * kMiB};
};

INSTANTIATE_TEST_SUITE_P(Backends, CallersStagingTest, testing::kBackends, testing::backend_name);

TEST_P(CallersStagingTest, IsPageLockedByTheEngineAsLongAsItLives) {
  start_engine_there();
  EXPECT_EQ(cuda().registrations(), 1);
  EXPECT_TRUE(load_and_check().pinned);
  EXPECT_EQ(engine_->pinned_bytes(), staging_.size());
  EXPECT_EQ(cuda().pageable_copies(), 0);
  engine_.reset();
  EXPECT_EQ(cuda().registrations(), 0);
  EXPECT_TRUE(staging_.intact());
}

TEST_P(CallersStagingTest, StaysAsItIsIfItsOwnerHasPageLockedIt) {
  ASSERT_EQ(cudaHostRegister(staging_.data(), staging_.size(), cudaHostRegisterPortable), cudaSuccess);
  start_engine_there();
  const TransferStats stats = load_and_check();
  EXPECT_TRUE(stats.pinned);
  EXPECT_EQ(stats.fallback_reason, "");
  EXPECT_EQ(cuda().pageable_copies(), 0);
  engine_.reset();
  EXPECT_EQ(cuda().registrations(), 1) << "it is the caller's";
  ASSERT_EQ(cudaHostUnregister(staging_.data()), cudaSuccess);
}

TEST_P(CallersStagingTest, OfWhichOnlyAPartIsPageLockedIsToldAndCopiedFromAllTheSame) {
  ASSERT_EQ(cudaHostRegister(staging_.data(), 4 * kMiB, cudaHostRegisterPortable), cudaSuccess);
  start_engine_there();
  const TransferStats stats = load_and_check();
  EXPECT_FALSE(stats.pinned);
  EXPECT_NE(stats.fallback_reason.find("cudaErrorHostMemoryAlreadyRegistered"), std::string::npos);
  engine_.reset();
  ASSERT_EQ(cudaHostUnregister(staging_.data()), cudaSuccess);
}

TEST_P(CudaWorldTest, AContextThatIsGoneIsAnErrorAndANewEngineWorks) {
  std::byte* const target = cuda().allocate(bytes_.size());
  engine_->load(request(target));
  cuda().lose_context(1);
  const auto error = error_of([&] { engine_->load(request(target)); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code().category(), cuda_category()) << error->what();
  EXPECT_FALSE(cuda().has_context(0)) << "the caller's device was asked in its place";
  start_engine();
  engine_->load(request(target));
  EXPECT_TRUE(right(target));
}

TEST_P(CudaWorldTest, AContextThatGoesInTheMiddleOfALoadEndsItWithAnError) {
  cuda().hold(true);
  Transfer transfer = engine_->start_load(request(cuda().allocate(bytes_.size())));
  testing::wait_until([&] { return cuda().most_copies_under_way() >= 8; });
  const int calls = cuda().calls("cuCtxPushCurrent");
  cuda().lose_context(1);
  ASSERT_TRUE(transfer.wait_for(kHang));
  EXPECT_EQ(transfer.error().category(), cuda_category());
  EXPECT_LT(cuda().calls("cuCtxPushCurrent") - calls, 200) << "it asked on for what it had been told";
}

// Completions run on the driver thread.
struct LooksForErrors final : Completion {
  void done(Transfer&) noexcept override { found = cudaGetLastError(); }
  cudaError_t found = cudaErrorUnknown;
};

TEST_P(CudaWorldTest, CompletionsFindNoErrorOfTheEngines) {
  engine_.reset();
  cuda().fail("cudaHostRegister", 1, cudaErrorNotSupported);
  start_engine();
  LooksForErrors of_nothing;
  engine_->start_load({}, &of_nothing).wait();
  EXPECT_EQ(of_nothing.found, cudaSuccess) << "that memory could not be locked";
  start_engine();
  std::byte* const target = cuda().allocate(bytes_.size());
  cuda().fail("cudaMemcpyBatchAsync", 1, cudaErrorCallRequiresNewerDriver);
  const std::vector<Extent> two = {{5, 100, target}, {500, 100, target + 200}};
  LooksForErrors of_batch;
  engine_->start_load({.files = {{.path = path_, .extents = two}}}, &of_batch).wait();
  EXPECT_EQ(of_batch.found, cudaSuccess) << "that the driver knows no batches";
  for (const char* call : {"cudaMemcpyAsync", "cudaEventQuery"}) {
    cuda().fail(call, 1, cudaErrorMemoryAllocation);
    LooksForErrors of_failure;
    EXPECT_THROW(engine_->start_load(request(target), &of_failure).wait(), Error) << call;
    EXPECT_EQ(of_failure.found, cudaSuccess) << call << ": the transfer has that error";
  }
  for (int load = 0; load < 5; ++load) {
    LooksForErrors looks;
    engine_->start_load(request(target), &looks).wait();
    EXPECT_EQ(looks.found, cudaSuccess) << "that a copy had not landed yet";
  }
  const testing::CallersStream stream;
  cuda().start_kernel(stream.stream);
  Transfer waits = engine_->start_load(request(target, CachePolicy::kDirect, stream.stream));
  const int questions = cuda().calls("cudaEventQuery");
  testing::wait_until([&] { return cuda().calls("cudaEventQuery") != questions; });
  LooksForErrors passes;
  engine_->start_load({}, &passes).wait();
  EXPECT_EQ(passes.found, cudaSuccess) << "that a stream was not there yet";
  cuda().end_kernel(stream.stream);
  waits.wait();
}

TEST_P(CudaWorldTest, ErrorsWithAnAnswerBetweenThemAreNoLongSilence) {
  cuda().hold(true);
  Transfer transfer = engine_->start_load(request(cuda().allocate(bytes_.size())));
  testing::wait_until([&] { return cuda().most_copies_under_way() >= 8; });
  const auto ask = [](const char* question, int times) {
    const int before = cuda().calls(question);
    testing::wait_until([&] { return cuda().calls(question) >= before + times; });
  };
  cuda().fail("cudaEventQuery", 1, cudaErrorMemoryAllocation);
  ask("cudaEventQuery", 1);
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(1100)) ask("cudaStreamQuery", 1);
  cuda().fail("cudaStreamQuery", 1, cudaErrorMemoryAllocation);
  ask("cudaStreamQuery", 10);
  EXPECT_EQ(cuda().copies_under_way(1), 8) << "taken for ended after more than a second";
  EXPECT_FALSE(transfer.wait_for({}));
  cuda().hold(false);
  ASSERT_TRUE(transfer.wait_for(kHang));
}

TEST_P(CudaWorldTest, ADeviceMayBeResetBetweenTwoEngines) {
  std::byte* const target = cuda().allocate(bytes_.size());
  engine_->load(request(target));
  engine_.reset();
  cudaSetDevice(1);
  ASSERT_EQ(cudaDeviceReset(), cudaSuccess);
  start_engine();
  engine_->load(request(target));
  EXPECT_TRUE(right(target));
}

TEST_P(CudaWorldTest, TheCallersOwnErrorIsLeftToTheCaller) {
  testing::GuardedMemory memory(bytes_.size());
  std::byte* const target = cuda().allocate(bytes_.size());
  engine_->load(request(target));
  engine_->load(request(memory.data()));
  EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "nothing of ours";
  cuda().fail("cudaEventCreateWithFlags", 1, cudaErrorMemoryAllocation);
  EXPECT_TRUE(error_of([&] { engine_->load(request(target)); }));
  EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "told by the exception";
  EXPECT_EQ(cudaSetDevice(99), cudaErrorInvalidDevice);
  engine_->load(request(target));
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidDevice) << "the caller's";
}

// A child has the parent's memory and none of its contexts.
TEST_P(CudaWorldTest, AForkedChildGetsAClearErrorAndTheParentGoesOn) {
#if FLASHPACK_TSAN
  GTEST_SKIP() << "the thread sanitizer wants no threads in forked children";
#endif
  std::byte* const target = cuda().allocate(bytes_.size());
  Transfer transfer = engine_->start_load(request(target));
  transfer.wait();
  const pid_t child = ::fork();
  if (child == 0) {
    const auto of_the_parents = error_of([&] { engine_->load(request(target)); });
    const auto of_its_own = error_of([&] { Engine engine(options()); });
    const bool clear = of_the_parents && of_the_parents->code() == Errc::kUnusable && of_its_own &&
                       of_its_own->code() == std::error_code(cudaErrorInitializationError, cuda_category());
    ::_exit(clear ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  cuda().poison(target, bytes_.size());
  engine_->load(request(target));
  EXPECT_TRUE(right(target));
}

}  // namespace
}  // namespace flashpack
