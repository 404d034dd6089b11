// Rules of CUDA that the engine lives by, and that the fake runtime of the tests keeps. On a machine with a GPU the
// real runtime is asked, so that a fake that is wrong is found.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <semaphore>
#include <thread>
#include <vector>

#include "engine/ground/units.h"
#include "tests/support/gpu.h"

namespace flashpack {
namespace {

using internal::kMiB;
constexpr std::size_t kPage = 4096;

/// Owns pages of the host.
class Pages {
 public:
  explicit Pages(std::size_t size_bytes, int access = PROT_READ | PROT_WRITE, int flags = 0)
      : size_bytes_(size_bytes),
        memory_(::mmap(nullptr, size_bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0)) {
    EXPECT_NE(memory_, MAP_FAILED);
  }
  ~Pages() { ::munmap(memory_, size_bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  std::byte* data() const { return static_cast<std::byte*>(memory_); }

 private:
  std::size_t size_bytes_;
  void* memory_;
};

class CudaRulesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::require_gpu();
    if (IsSkipped() || HasFatalFailure()) return;
    ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
  }
  void TearDown() override {
    if (stream_ == nullptr) return;
    EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
    static_cast<void>(cudaGetLastError());
  }

  cudaEvent_t make_event() {
    cudaEvent_t event = nullptr;
    EXPECT_EQ(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess);
    return event;
  }
  // Keeps a stream busy until end_.release().
  void block(cudaStream_t stream) {
    const auto wait = [](void* self) { static_cast<CudaRulesTest*>(self)->end_.acquire(); };
    ASSERT_EQ(cudaLaunchHostFunc(stream, wait, this), cudaSuccess);
  }
  static cudaMemoryType type_of(const void* memory) {
    cudaPointerAttributes attributes{};
    EXPECT_EQ(cudaPointerGetAttributes(&attributes, memory), cudaSuccess);
    return attributes.type;
  }

  cudaStream_t stream_ = nullptr;
  std::counting_semaphore<> end_{0};
};

TEST_F(CudaRulesTest, MemoryIsRegisteredOnce) {
  const Pages pages(4 * kMiB);
  ASSERT_EQ(cudaHostRegister(pages.data() + kMiB, kMiB, cudaHostRegisterPortable), cudaSuccess);
  for (const std::size_t begin : {std::size_t{0}, std::size_t{kMiB}, kMiB + kPage}) {
    EXPECT_EQ(cudaHostRegister(pages.data() + begin, kMiB + kPage, cudaHostRegisterPortable),
              cudaErrorHostMemoryAlreadyRegistered)
        << begin;
  }
  EXPECT_EQ(cudaHostRegister(pages.data(), kMiB, cudaHostRegisterPortable), cudaSuccess) << "its neighbour";
  EXPECT_EQ(cudaHostUnregister(pages.data()), cudaSuccess);
  EXPECT_EQ(cudaHostUnregister(pages.data() + kMiB), cudaSuccess);
  EXPECT_EQ(cudaHostRegister(pages.data(), 4 * kMiB, cudaHostRegisterPortable), cudaSuccess);
  EXPECT_EQ(cudaHostUnregister(pages.data()), cudaSuccess);
}

TEST_F(CudaRulesTest, MemoryThatCannotBeWrittenIsNotRegistered) {
  const Pages read_only(kMiB, PROT_READ);
  EXPECT_NE(cudaHostRegister(read_only.data(), kMiB, cudaHostRegisterPortable), cudaSuccess);
  EXPECT_EQ(type_of(read_only.data()), cudaMemoryTypeUnregistered);
  EXPECT_NE(cudaHostRegister(read_only.data(), 0, cudaHostRegisterPortable), cudaSuccess);
}

TEST_F(CudaRulesTest, RegisteredMemoryIsThere) {
  const Pages pages(kMiB, PROT_READ | PROT_WRITE, MAP_NORESERVE);
  ASSERT_EQ(cudaHostRegister(pages.data(), kMiB, cudaHostRegisterPortable), cudaSuccess);
  std::array<unsigned char, kMiB / kPage> resident{};
  ASSERT_EQ(::mincore(pages.data(), kMiB, resident.data()), 0);
  for (const unsigned char each : resident) EXPECT_EQ(each & 1, 1);
  EXPECT_EQ(cudaHostUnregister(pages.data()), cudaSuccess);
}

TEST_F(CudaRulesTest, MemoryIsToldByItsKind) {
  const Pages pages(kMiB);
  EXPECT_EQ(type_of(pages.data()), cudaMemoryTypeUnregistered);
  ASSERT_EQ(cudaHostRegister(pages.data(), kMiB, cudaHostRegisterPortable), cudaSuccess);
  EXPECT_EQ(type_of(pages.data() + 5), cudaMemoryTypeHost);
  EXPECT_EQ(cudaHostUnregister(pages.data()), cudaSuccess);
  EXPECT_EQ(type_of(pages.data() + 5), cudaMemoryTypeUnregistered);
  void* memory = nullptr;
  ASSERT_EQ(cudaMallocManaged(&memory, kMiB, cudaMemAttachGlobal), cudaSuccess);
  EXPECT_EQ(type_of(memory), cudaMemoryTypeManaged);
  EXPECT_EQ(cudaFree(memory), cudaSuccess);
  block(stream_);
  ASSERT_EQ(cudaMallocAsync(&memory, kMiB, stream_), cudaSuccess);
  cudaPointerAttributes attributes{};
  EXPECT_EQ(cudaPointerGetAttributes(&attributes, memory), cudaSuccess) << "before its stream has come there";
  EXPECT_EQ(attributes.type, cudaMemoryTypeDevice);
  EXPECT_EQ(attributes.device, 0);
  end_.release();
  EXPECT_EQ(cudaFreeAsync(memory, stream_), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
}

TEST_F(CudaRulesTest, AnEventIsItsLastRecordAndNoOther) {
  cudaEvent_t event = make_event();
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess) << "never recorded";
  block(stream_);
  ASSERT_EQ(cudaEventRecord(event, stream_), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(event), cudaErrorNotReady);
  EXPECT_EQ(cudaEventDestroy(event), cudaSuccess) << "not awaited";
  cudaStream_t other = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking), cudaSuccess);
  std::binary_semaphore end_of_other{0};
  ASSERT_EQ(cudaLaunchHostFunc(
                other, [](void* end) { static_cast<std::binary_semaphore*>(end)->acquire(); }, &end_of_other),
            cudaSuccess);
  event = make_event();
  ASSERT_EQ(cudaEventRecord(event, other), cudaSuccess);
  end_.release();
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(event), cudaErrorNotReady) << "the record of an event that is gone came to its end";
  end_of_other.release();
  EXPECT_EQ(cudaStreamSynchronize(other), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess);
  EXPECT_EQ(cudaEventDestroy(event), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(other), cudaSuccess);
}

TEST_F(CudaRulesTest, ACopyOfMemoryThatIsNotLockedHasReadItWithinTheCall) {
  void* target = nullptr;
  ASSERT_EQ(cudaMalloc(&target, kMiB), cudaSuccess);
  for (int round = 0; round < 8; ++round) {
    std::vector<std::byte> source(kMiB, std::byte{1});
    ASSERT_EQ(cudaMemcpyAsync(target, source.data(), kMiB, cudaMemcpyHostToDevice, stream_), cudaSuccess);
    std::memset(source.data(), 2, kMiB);
    std::vector<std::byte> got(kMiB);
    ASSERT_EQ(cudaMemcpyAsync(got.data(), target, kMiB, cudaMemcpyDeviceToHost, stream_), cudaSuccess);
    ASSERT_EQ(got, std::vector<std::byte>(kMiB, std::byte{1}));
  }
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  EXPECT_EQ(cudaFree(target), cudaSuccess);
}

TEST_F(CudaRulesTest, AThreadAskedDuringACaptureEndsItUnlessItsModeIsRelaxed) {
  cudaEvent_t event = make_event();
  for (const cudaStreamCaptureMode mode : {cudaStreamCaptureModeRelaxed, cudaStreamCaptureModeGlobal}) {
    ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal), cudaSuccess);
    const bool relaxed = mode == cudaStreamCaptureModeRelaxed;
    std::thread([&, exchanged = mode]() mutable {
      EXPECT_EQ(cudaThreadExchangeStreamCaptureMode(&exchanged), cudaSuccess);
      EXPECT_EQ(exchanged, cudaStreamCaptureModeGlobal) << "where a thread begins";
      EXPECT_EQ(cudaEventQuery(event), relaxed ? cudaSuccess : cudaErrorStreamCaptureUnsupported);
    }).join();
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), relaxed ? cudaSuccess : cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(graph != nullptr, relaxed);
    if (graph != nullptr) {
      EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    }
  }
  EXPECT_EQ(cudaEventDestroy(event), cudaSuccess);
}

TEST_F(CudaRulesTest, AnEventOfACaptureAnswersNoQuestion) {
  cudaEvent_t event = make_event();
  ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), cudaSuccess);
  EXPECT_EQ(cudaEventRecord(event, stream_), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(event), cudaErrorCapturedEvent);
  cudaGraph_t graph = nullptr;
  static_cast<void>(cudaStreamEndCapture(stream_, &graph));
  if (graph != nullptr) {
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  }
  EXPECT_EQ(cudaEventDestroy(event), cudaSuccess);
}

#if CUDART_VERSION >= 12080
TEST_F(CudaRulesTest, ABatchHasAStreamOfItsOwnAndAttributesForAllItsCopies) {
  const Pages pages(kMiB);
  ASSERT_EQ(cudaHostRegister(pages.data(), kMiB, cudaHostRegisterPortable), cudaSuccess);
  void* target = nullptr;
  ASSERT_EQ(cudaMalloc(&target, kMiB), cudaSuccess);
  std::array<void*, 2> targets{target, static_cast<std::byte*>(target) + 5000};
  std::array<void*, 2> sources{pages.data() + 1, pages.data() + 6001};
  std::array<std::size_t, 2> sizes{4999, 100};
  const auto batch = [&](cudaMemcpySrcAccessOrder order, std::size_t first, std::size_t count, cudaStream_t stream) {
    cudaMemcpyAttributes attributes{};
    attributes.srcAccessOrder = order;
#if CUDART_VERSION >= 13000
    return cudaMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(), 2, &attributes, &first, count, stream);
#else
    std::size_t failed = 0;
    return cudaMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(), 2, &attributes, &first, count, &failed,
                                stream);
#endif
  };
  const cudaError_t supported = batch(cudaMemcpySrcAccessOrderStream, 0, 1, stream_);
  if (supported == cudaErrorCallRequiresNewerDriver || supported == cudaErrorNotSupported) {
    GTEST_SKIP() << "the driver knows no batches";
  }
  EXPECT_EQ(supported, cudaSuccess);
  EXPECT_NE(batch(cudaMemcpySrcAccessOrderStream, 0, 1, nullptr), cudaSuccess) << "the legacy default stream";
  EXPECT_NE(batch(cudaMemcpySrcAccessOrderInvalid, 0, 1, stream_), cudaSuccess) << "no order";
  EXPECT_NE(batch(cudaMemcpySrcAccessOrderStream, 1, 1, stream_), cudaSuccess) << "none for the first copy";
  EXPECT_NE(batch(cudaMemcpySrcAccessOrderStream, 0, 0, stream_), cudaSuccess) << "none at all";
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  EXPECT_EQ(cudaHostUnregister(pages.data()), cudaSuccess);
  EXPECT_EQ(cudaFree(target), cudaSuccess);
}
#endif

TEST_F(CudaRulesTest, AStreamIsOfOneDeviceAndItsEventsToo) {
  int count = 0;
  ASSERT_EQ(cudaGetDeviceCount(&count), cudaSuccess);
  if (count < 2) GTEST_SKIP() << "one device";
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  cudaEvent_t event = make_event();
  EXPECT_EQ(cudaEventRecord(event, stream_), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaEventDestroy(event), cudaSuccess);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  EXPECT_EQ(cudaSetDevice(count), cudaErrorInvalidDevice);
}

}  // namespace
}  // namespace flashpack
