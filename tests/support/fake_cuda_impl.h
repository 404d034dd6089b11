/// Shared by FakeCuda and its runtime functions.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/support/counted_new.h"
#include "tests/support/fake_cuda.h"

struct CUevent_st {
  CUctx_st* context;
  bool done = true;
  bool captured = false;
  std::uint64_t record = 0;  // No two of any events are the same.
};

namespace flashpack::testing {

[[noreturn]] void misuse(const char* what);
inline void require(bool holds, const char* what) {
  if (!holds) misuse(what);
}

struct Work {
  enum class Kind : std::uint8_t {
    kQuick,
    kCopy,    // Waits while copies are held.
    kKernel,  // Goes on until somebody ends it.
  } kind;
  std::function<void()> act;                   // In the fake, when it is done.
  std::span<const std::byte> locked_memory{};  // Where a copy begins or ends on the host.
  std::uint64_t number = 0;                    // Counts all work, in the order of the calls.
};

struct Capture {
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  bool broken = false;
  std::vector<Work> graph;
};

/// In the driver, what the engine does not ask for; null when there is no such function, or no stand_in/cudart.cc.
[[gnu::weak]] void* find_more_in_driver(const std::string& name);

}  // namespace flashpack::testing

struct CUgraph_st {
  std::vector<flashpack::testing::Work> works;
};

struct CUstream_st {
  CUctx_st* context;
  bool blocking = false;  // It waits for the legacy default stream, and that for it.
  std::deque<flashpack::testing::Work> queue;
  int touches = 0;
  std::optional<flashpack::testing::Capture> capture;
};

struct CUctx_st {
  int device = 0;
  bool alive = false;
  bool was_reset = false;
  cudaError_t sticky = cudaSuccess;
  CUstream_st legacy{};
};

namespace flashpack::testing {

class FakeCuda::Impl {
 public:
  static constexpr int kDevices = 2;  // Seen, unless show_devices() says otherwise.
  static constexpr int kMostDevices = 3;

  // One physical allocation: mapped twice, once where nobody may touch it (unless it is managed) and once for us.
  struct Region {
    std::byte* address;
    std::byte* shadow;
    std::size_t size_bytes;
    int device;
    bool managed = false;
    bool there = true;  // The stream has come to the allocation, where memory is stream-ordered.
  };

  struct Registration {
    std::size_t size_bytes;
    CUctx_st* context;
    bool portable;
  };

  struct Failure {
    int countdown;
    cudaError_t error;
    bool sticky;
    int times;
  };

  // The runtime and the driver keep these for each thread.
  struct Thread {
    unsigned epoch = 0;
    int device = 0;
    std::vector<CUctx_st*> contexts;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    cudaError_t last_error = cudaSuccess;
  };

  enum class Kind : std::uint8_t {
    kNoContext,
    kSafe,
    kUnsafe,  // May wait for the device.
  };

  Impl();

  /// The beginning of every runtime function: what it must give instead of doing its work.
  cudaError_t enter(const char* function, Kind kind);
  cudaError_t note(cudaError_t error);
  /// The calling thread's.
  Thread& thread();
  /// Requires: enter() with a context has been passed.
  CUctx_st& context() { return *thread().contexts.back(); }
  CUctx_st& primary(int device);
  void destroy(CUctx_st& context);

  CUstream_st* stream_of(cudaStream_t stream, CUctx_st& context);
  std::vector<CUstream_st*> all_streams();
  /// Or makes it part of the graph that is captured. An error when that would break another capture.
  cudaError_t queue(CUstream_st& stream, Work work);

  std::byte* map(std::size_t size_bytes, int device, bool managed, std::byte* at = nullptr,
                 std::byte* shadow_at = nullptr);
  Region* region_of(const void* memory);
  std::byte* shadow_of(const void* memory, std::size_t size_bytes);
  /// For copies in `context`.
  bool registered(const void* memory, std::size_t size_bytes, const CUctx_st& context) const;
  const Registration* registration_near(const void* memory, std::size_t size_bytes) const;
  bool is_being_copied(std::span<const std::byte> memory);
  /// To be read or written at once, on the host or a device.
  std::byte* reachable(const void* memory, std::size_t size_bytes);
  cudaError_t copy(CUstream_st& stream, void* target, const void* source, std::size_t size_bytes);

  bool may_begin(const CUstream_st& stream) const;
  bool do_one(CUstream_st& stream);
  void do_some();
  void finish(CUstream_st& stream);

  std::mutex mutex;  // Protects the rest.
  unsigned epoch = 1;
  pid_t owner;
  bool unloading = false;
  std::mt19937 random{1};
  bool held = false;
  int devices = kDevices;
  std::uint64_t works = 0;
  std::uint64_t records = 0;
  std::array<CUctx_st, kMostDevices> contexts;
  std::set<CUstream_st*> streams;
  std::map<std::pair<CUctx_st*, std::thread::id>, CUstream_st> per_thread;
  std::set<CUevent_st*> events;
  std::map<std::byte*, Registration> registrations;
  std::vector<Region> regions;
  std::deque<CUgraph_st> graphs;  // Until the reset.
  std::map<std::string, Failure> failures;
  std::map<std::string, int> calls;
  std::set<std::pair<std::string, std::string>> callers;
  int all_calls = 0;
  int pageable_copies = 0;
  int copies_under_way = 0;
  int most_copies_under_way = 0;

 private:
  bool breaks_captures();
};

/// In the fake, alone.
class Inside {
 public:
  Inside();
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;
  FakeCuda::Impl* operator->() { return impl_; }
  FakeCuda::Impl& operator*() { return *impl_; }

 private:
  FakeCuda::Impl* const impl_;
  std::lock_guard<std::mutex> lock_;
  NotCounted not_counted_;
};

}  // namespace flashpack::testing
