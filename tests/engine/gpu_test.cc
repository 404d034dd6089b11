// The device path on a real GPU. Skipped without one, which fails where FLASHPACK_REQUIRE_GPU=1 says that there is one.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <optional>
#include <semaphore>
#include <string_view>
#include <thread>
#include <vector>

#include "engine/cuda_handles.h"
#include "engine/ground/unique_fd.h"
#include "flashpack/engine.h"
#include "tests/support/gpu.h"
#include "tests/support/temp_dir.h"
#include "tests/support/units.h"

namespace flashpack {
namespace {

using testing::kMiB;

using internal::cuda::driver_function;

constexpr std::array kCaptureModes = {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal,
                                      cudaStreamCaptureModeRelaxed};

// Work of a stream that does not end before it is let go.
class Busy {
 public:
  explicit Busy(cudaStream_t stream) {
    EXPECT_EQ(
        cudaLaunchHostFunc(stream, [](void* self) { static_cast<Busy*>(self)->end_.acquire(); }, this), cudaSuccess);
  }
  void end() { end_.release(); }

 private:
  std::binary_semaphore end_{0};
};

// One range of addresses over several allocations, as the allocator of torch makes it with expandable_segments.
class MappedMemory {
 public:
  explicit MappedMemory(std::size_t parts) {
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0};
    call<decltype(cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity", &part_bytes_, &properties,
                                                  CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    size_bytes_ = parts * part_bytes_;
    call<decltype(cuMemAddressReserve)>("cuMemAddressReserve", &address_, size_bytes_, 0u, CUdeviceptr{0}, 0u);
    for (CUdeviceptr at = address_; at < address_ + size_bytes_; at += part_bytes_) {
      CUmemGenericAllocationHandle part = 0;
      call<decltype(cuMemCreate)>("cuMemCreate", &part, part_bytes_, &properties, 0u);
      call<decltype(cuMemMap)>("cuMemMap", at, part_bytes_, 0u, part, 0u);
      call<decltype(cuMemRelease)>("cuMemRelease", part);  // The mapping keeps it.
    }
    const CUmemAccessDesc access{.location = properties.location, .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    call<decltype(cuMemSetAccess)>("cuMemSetAccess", address_, size_bytes_, &access, 1u);
  }
  ~MappedMemory() {
    call<decltype(cuMemUnmap)>("cuMemUnmap", address_, size_bytes_);
    call<decltype(cuMemAddressFree)>("cuMemAddressFree", address_, size_bytes_);
  }
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  std::byte* data() const { return reinterpret_cast<std::byte*>(address_); }
  std::size_t size() const { return size_bytes_; }

 private:
  template <class Function, class... Arguments>
  static void call(const char* name, Arguments... arguments) {
    EXPECT_EQ(driver_function<Function>(name)(arguments...), CUDA_SUCCESS) << name;
  }

  CUdeviceptr address_ = 0;
  std::size_t part_bytes_ = 0;
  std::size_t size_bytes_ = 0;
};

TEST(DeviceOfAnEngine, ThatIsNotThereIsAClearError) {
  try {
    Engine engine({.device = {Device::Kind::kCuda, 9999}});
    FAIL() << "an engine for device 9999";
  } catch (const Error& error) {
    EXPECT_NE(std::string_view(error.what()).find("cuda"), std::string_view::npos) << error.what();
  }
}

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::require_gpu();
    if (IsSkipped() || HasFatalFailure()) return;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
  }
  void TearDown() override {
    if (stream_ != nullptr) {
      EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
    }
  }

  // Memory of a stream-ordered allocator: nobody may touch it before the stream has come to the allocation.
  std::byte* allocate(std::size_t size_bytes) {
    void* memory = nullptr;
    EXPECT_EQ(cudaMallocAsync(&memory, size_bytes, stream_), cudaSuccess);
    EXPECT_EQ(cudaMemsetAsync(memory, 0xAB, size_bytes, stream_), cudaSuccess);
    return static_cast<std::byte*>(memory);
  }
  std::vector<std::byte> take(std::byte* memory, std::size_t size_bytes) {
    std::vector<std::byte> bytes = read(memory, size_bytes);
    EXPECT_EQ(cudaFreeAsync(memory, stream_), cudaSuccess);
    return bytes;
  }
  std::vector<std::byte> read(const std::byte* memory, std::size_t size_bytes) {
    std::vector<std::byte> bytes(size_bytes);
    EXPECT_EQ(cudaMemcpyAsync(bytes.data(), memory, size_bytes, cudaMemcpyDefault, stream_), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    return bytes;
  }

  LoadRequest request(std::byte* target, cudaStream_t stream, std::size_t size_bytes) const {
    return {.files = {{.path = path_, .extents = {{0, size_bytes, target}}}}, .stream = stream};
  }
  LoadRequest request(std::byte* target, cudaStream_t stream) const { return request(target, stream, bytes_.size()); }

  // The bytes of the file, and nothing before the stream that is said to be busy has come there.
  void expect_behind(cudaStream_t busy_stream, cudaStream_t stream) {
    testing::write_file(path_, bytes_);
    Engine engine({.device = {Device::Kind::kCuda, 0}});
    std::byte* target = allocate(bytes_.size());
    ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    Busy busy(busy_stream);
    Transfer transfer = engine.start_load(request(target, stream));
    EXPECT_FALSE(transfer.wait_for(std::chrono::milliseconds(50)));
    const auto before = read(target, bytes_.size());
    EXPECT_TRUE(std::all_of(before.begin(), before.end(), [](std::byte byte) { return byte == std::byte{0xAB}; }));
    busy.end();
    transfer.wait();
    EXPECT_EQ(take(target, bytes_.size()), bytes_);
  }

  testing::TempDir dir_;
  std::filesystem::path path_ = dir_ / "model";
  std::vector<std::byte> bytes_ = testing::random_bytes(100 * kMiB + 1234);
  cudaStream_t stream_ = nullptr;
};

TEST_F(GpuTest, EveryRouteBringsTheBytesBehindWhatTheStreamHasToDo) {
  testing::write_file(path_, bytes_);
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  for (const CachePolicy cache : {CachePolicy::kDirect, CachePolicy::kBuffered, CachePolicy::kAuto}) {
    std::byte* target = allocate(bytes_.size());
    const TransferStats stats = engine.load(
        {.files = {{.path = path_, .extents = {{0, bytes_.size(), target}}}}, .cache = cache, .stream = stream_});
    EXPECT_TRUE(stats.pinned);
    EXPECT_EQ(take(target, bytes_.size()), bytes_);
  }
}

TEST_F(GpuTest, SmallTensorsAtOddPlacesArriveInBatches) {
  testing::write_file(path_, bytes_);
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  std::byte* target = allocate(bytes_.size());
  FileExtents file{.path = path_};
  std::vector<std::byte> expected(bytes_.size(), std::byte{0xAB});
  for (std::uint64_t at = 1; at + 5000 < bytes_.size(); at += 7919) {
    const std::uint64_t size = 1 + at % 4999;
    file.extents.push_back({at, size, target + at});
    std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(at), size,
                expected.begin() + static_cast<std::ptrdiff_t>(at));
  }
  engine.load({.files = {file}, .stream = stream_});
  EXPECT_EQ(take(target, bytes_.size()), expected);
}

TEST_F(GpuTest, MemoryOfEveryKindIsATarget) {
  testing::write_file(path_, bytes_);
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  const auto expect_load = [&](const char* kind, std::byte* target, std::size_t size_bytes) {
    SCOPED_TRACE(kind);
    engine.load(request(target, stream_, size_bytes));
    const auto got = read(target, size_bytes);
    EXPECT_EQ(std::memcmp(got.data(), bytes_.data(), size_bytes), 0);
  };
  void* memory = nullptr;
  ASSERT_EQ(cudaMalloc(&memory, bytes_.size()), cudaSuccess);
  expect_load("cudaMalloc", static_cast<std::byte*>(memory), bytes_.size());
  EXPECT_EQ(cudaFree(memory), cudaSuccess);
  ASSERT_EQ(cudaMallocManaged(&memory, bytes_.size(), cudaMemAttachGlobal), cudaSuccess);
  expect_load("cudaMallocManaged", static_cast<std::byte*>(memory), bytes_.size());
  EXPECT_EQ(cudaFree(memory), cudaSuccess);
  ASSERT_EQ(cudaMallocHost(&memory, bytes_.size()), cudaSuccess);
  expect_load("cudaMallocHost", static_cast<std::byte*>(memory), bytes_.size());
  EXPECT_EQ(cudaFreeHost(memory), cudaSuccess);
  std::vector<std::byte> registered(bytes_.size());
  ASSERT_EQ(cudaHostRegister(registered.data(), registered.size(), cudaHostRegisterDefault), cudaSuccess);
  expect_load("cudaHostRegister", registered.data(), registered.size());
  EXPECT_EQ(cudaHostUnregister(registered.data()), cudaSuccess);
  const MappedMemory mapped(5);
  const std::size_t size = std::min(mapped.size(), bytes_.size());
  expect_load("cuMemMap", mapped.data(), size);
  FileExtents small{.path = path_};  // In batches, and some of them over the seams.
  for (std::size_t at = 0; at + 5000 <= size; at += 5000) small.extents.push_back({at, 4999, mapped.data() + at});
  ASSERT_EQ(cudaMemsetAsync(mapped.data(), 0, size, stream_), cudaSuccess);
  engine.load({.files = {small}, .stream = stream_});
  const auto got = read(mapped.data(), size);
  for (const Extent& extent : small.extents) {
    ASSERT_EQ(std::memcmp(got.data() + extent.offset_bytes, bytes_.data() + extent.offset_bytes, 4999), 0);
  }
}

TEST_F(GpuTest, TensOfThousandsOfTinyFragmentsOfOneChunkArrive) {
  testing::write_file(path_, bytes_);
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  const std::size_t size = 9 * kMiB;
  std::byte* target = allocate(size);
  FileExtents file{.path = path_};
  std::vector<std::byte> expected(size, std::byte{0xAB});
  for (std::size_t at = 3; at + 128 < size; at += 128) {
    file.extents.push_back({at, 64, target + at});
    std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(at), 64,
                expected.begin() + static_cast<std::ptrdiff_t>(at));
  }
  const TransferStats stats = engine.load({.files = {file}, .stream = stream_});
  EXPECT_EQ(take(target, size), expected);
  RecordProperty("fallback_reason", stats.fallback_reason);
}

TEST_F(GpuTest, AGraphIsCapturedUndisturbedByLoadsAndByNewEngines) {
  testing::write_file(path_, bytes_);
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  cudaStream_t capturing = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&capturing, cudaStreamNonBlocking), cudaSuccess);
  std::byte* cleared = allocate(kMiB);
  for (const cudaStreamCaptureMode mode : kCaptureModes) {
    SCOPED_TRACE(mode);
    std::array<std::byte*, 5> targets{};
    for (std::byte*& target : targets) target = allocate(bytes_.size());
    ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    ASSERT_EQ(cudaStreamBeginCapture(capturing, mode), cudaSuccess);
    ASSERT_EQ(cudaMemsetAsync(cleared, 7, kMiB, capturing), cudaSuccess);
    engine.load(request(targets[0], nullptr));
    engine.load(request(targets[1], stream_));
    std::thread([&] {
      engine.load(request(targets[2], nullptr));
      engine.load(request(targets[3], stream_));
      Engine({.device = {Device::Kind::kCuda, 0}}).load(request(targets[4], stream_));
    }).join();
    cudaGraph_t graph = nullptr;
    ASSERT_EQ(cudaStreamEndCapture(capturing, &graph), cudaSuccess);
    std::size_t nodes = 0;
    EXPECT_EQ(cudaGraphGetNodes(graph, nullptr, &nodes), cudaSuccess);
    EXPECT_EQ(nodes, 1u);
    cudaGraphExec_t executable = nullptr;
    ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    ASSERT_EQ(cudaGraphLaunch(executable, stream_), cudaSuccess);
    EXPECT_EQ(read(cleared, kMiB), std::vector(kMiB, std::byte{7}));
    EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    for (std::byte* target : targets) EXPECT_EQ(take(target, bytes_.size()), bytes_);
  }
  take(cleared, kMiB);
  EXPECT_EQ(cudaStreamDestroy(capturing), cudaSuccess);
}

TEST_F(GpuTest, AStreamThatIsCapturedIsRefusedAndTheGraphStaysWhole) {
  testing::write_file(path_, bytes_);
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  cudaStream_t blocking = nullptr;
  ASSERT_EQ(cudaStreamCreate(&blocking), cudaSuccess);
  std::byte* target = allocate(bytes_.size());
  ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  for (const auto& [capturing, behind] : {std::pair{stream_, stream_}, {blocking, blocking}, {blocking, nullptr}}) {
    ASSERT_EQ(cudaStreamBeginCapture(capturing, cudaStreamCaptureModeRelaxed), cudaSuccess);
    try {
      engine.load(request(target, behind));
      ADD_FAILURE() << "loaded behind a capture";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kInvalidArgument) << error.what();
    }
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(capturing, &graph), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  }
  EXPECT_EQ(cudaStreamDestroy(blocking), cudaSuccess);
  engine.load(request(target, stream_));
  EXPECT_EQ(take(target, bytes_.size()), bytes_);
}

TEST_F(GpuTest, TheLegacyDefaultStreamStandsForTheStreamsThatItWaitsFor) {
  cudaStream_t blocking = nullptr;
  ASSERT_EQ(cudaStreamCreate(&blocking), cudaSuccess);
  expect_behind(blocking, nullptr);
  expect_behind(nullptr, nullptr);
  EXPECT_EQ(cudaStreamDestroy(blocking), cudaSuccess);
}

TEST_F(GpuTest, ThePerThreadDefaultStreamIsTheCallingThreads) {
  expect_behind(cudaStreamPerThread, cudaStreamPerThread);
}

TEST_F(GpuTest, WhatHasLandedIsThereForAnyStreamAtOnce) {
  testing::write_file(path_, bytes_);
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  cudaStream_t other = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking), cudaSuccess);
  std::byte* target = allocate(bytes_.size());
  std::byte* copy = allocate(bytes_.size());
  for (int round = 0; round < 10; ++round) {
    ASSERT_EQ(cudaMemsetAsync(target, round, bytes_.size(), stream_), cudaSuccess);
    engine.load(request(target, stream_));
    ASSERT_EQ(cudaMemcpyAsync(copy, target, bytes_.size(), cudaMemcpyDeviceToDevice, other), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(other), cudaSuccess);
    ASSERT_EQ(read(copy, bytes_.size()), bytes_);
  }
  take(target, bytes_.size());
  take(copy, bytes_.size());
  EXPECT_EQ(cudaStreamDestroy(other), cudaSuccess);
}

TEST_F(GpuTest, NoContextIsMadeButTheEngines) {
  testing::write_file(path_, bytes_);
  int count = 0;
  ASSERT_EQ(cudaGetDeviceCount(&count), cudaSuccess);
  std::byte* target = allocate(bytes_.size());
  const auto state = driver_function<decltype(cuDevicePrimaryCtxGetState)>("cuDevicePrimaryCtxGetState");
  const auto current = driver_function<decltype(cuCtxGetCurrent)>("cuCtxGetCurrent");
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  CUcontext left = nullptr;
  std::thread([&] {
    engine.load(request(target, stream_));
    Transfer cancelled = engine.start_load(request(target, nullptr));
    cancelled.cancel();
    static_cast<void>(cancelled.wait_for(std::chrono::minutes(1)));
    EXPECT_EQ(current(&left), CUDA_SUCCESS);
  }).join();
  EXPECT_EQ(left, nullptr) << "a thread that had no context has one";
  for (int device = 1; device < count; ++device) {
    unsigned flags = 0;
    int active = -1;
    EXPECT_EQ(state(device, &flags, &active), CUDA_SUCCESS);
    EXPECT_EQ(active, 0) << "device " << device;
  }
  take(target, bytes_.size());
}

TEST_F(GpuTest, CancelledBehindABusyStreamItEndsAtOnceAndTheNextLoadIsRight) {
  testing::write_file(path_, bytes_);
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  std::byte* target = allocate(bytes_.size());
  Busy busy(stream_);
  Transfer transfer = engine.start_load(request(target, stream_));
  transfer.cancel();
  EXPECT_TRUE(transfer.wait_for(std::chrono::minutes(1)));
  busy.end();
  engine.load(request(target, stream_));
  EXPECT_EQ(take(target, bytes_.size()), bytes_);
}

TEST_F(GpuTest, AForkInTheMiddleOfALoadChangesNothingForTheParent) {
  testing::write_file(path_, bytes_);
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  for (int round = 0; round < 3; ++round) {
    std::byte* target = allocate(bytes_.size());
    Transfer transfer = engine.start_load(request(target, stream_));
    const pid_t child = ::fork();
    if (child == 0) ::_exit(0);
    int status = -1;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    transfer.wait();
    EXPECT_EQ(take(target, bytes_.size()), bytes_);
  }
}

TEST_F(GpuTest, TwoEnginesOfOneDeviceLoadAtOnce) {
  testing::write_file(path_, bytes_);
  Engine one({.device = {Device::Kind::kCuda, 0}});
  Engine two({.device = {Device::Kind::kCuda, 0}});
  std::byte* a = allocate(bytes_.size());
  std::byte* b = allocate(bytes_.size());
  Transfer first = one.start_load(request(a, stream_));
  Transfer second = two.start_load(request(b, stream_));
  first.wait();
  second.wait();
  EXPECT_EQ(take(a, bytes_.size()), bytes_);
  EXPECT_EQ(take(b, bytes_.size()), bytes_);
}

// Each in a process of its own, which starts afresh.
class GpuProcessTest : public GpuTest {
 protected:
  void SetUp() override {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    GpuTest::SetUp();
  }
  // From a file without a name, because the fixture of such a process does not come to its end.
  Transfer start(Engine& engine, std::byte* target, cudaStream_t stream) {
    std::filesystem::create_directory(dir_.path());
    testing::write_file(path_, bytes_);
    const internal::UniqueFd file(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
    std::filesystem::remove_all(dir_.path());
    LoadRequest load = request(target, stream);
    load.files[0].fd = file.get();
    return engine.start_load(load);
  }
};
using GpuProcessDeathTest = GpuProcessTest;

TEST_F(GpuProcessDeathTest, MayEndInTheMiddleOfALoadOfAStaticEngine) {
  const auto exit_now = [&] {
    static Engine engine({.device = {Device::Kind::kCuda, 0}});
    static Transfer transfer = start(engine, allocate(bytes_.size()), stream_);
    std::exit(0);
  };
  EXPECT_EXIT(exit_now(), ::testing::ExitedWithCode(0), "");
}

TEST_F(GpuProcessDeathTest, MayEndInTheMiddleOfALoadOfAnEngineThatIsNeverDestroyed) {
  const auto exit_now = [&] {
    auto* engine = new Engine({.device = {Device::Kind::kCuda, 0}});
    static_cast<void>(new Transfer(start(*engine, allocate(bytes_.size()), stream_)));
    std::exit(0);
  };
  EXPECT_EXIT(exit_now(), ::testing::ExitedWithCode(0), "");
}

TEST_F(GpuProcessDeathTest, MayResetItsDeviceBetweenTwoEngines) {
  const auto reset = [&] {
    std::optional<Engine> engine(EngineOptions{.device = {Device::Kind::kCuda, 0}});
    start(*engine, allocate(bytes_.size()), stream_).wait();
    engine.reset();
    if (cudaDeviceReset() != cudaSuccess) std::exit(2);
    engine.emplace(EngineOptions{.device = {Device::Kind::kCuda, 0}});
    void* target = nullptr;
    if (cudaMalloc(&target, bytes_.size()) != cudaSuccess) std::exit(3);
    start(*engine, static_cast<std::byte*>(target), nullptr).wait();
    std::vector<std::byte> got(bytes_.size());
    if (cudaMemcpy(got.data(), target, got.size(), cudaMemcpyDeviceToHost) != cudaSuccess) std::exit(4);
    engine.reset();
    std::_Exit(got == bytes_ ? 0 : 5);
  };
  EXPECT_EXIT(reset(), ::testing::ExitedWithCode(0), "");
}

TEST_F(GpuTest, AStoreWritesWhatTheStreamHasPutThere) {
  Engine engine({.device = {Device::Kind::kCuda, 0}});
  std::byte* source = allocate(bytes_.size());
  ASSERT_EQ(cudaMemcpyAsync(source, bytes_.data(), bytes_.size(), cudaMemcpyHostToDevice, stream_), cudaSuccess);
  FileWriter writer = engine.create(path_, {.payload_bytes = bytes_.size()});
  writer.write({.extents = {{0, bytes_.size(), source}}, .stream = stream_});
  writer.commit({});
  EXPECT_TRUE(testing::file_has(path_, bytes_));
  take(source, bytes_.size());
}

}  // namespace
}  // namespace flashpack
