#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <string>
#include <vector>

namespace flashpack::testing {

/// The CUDA runtime that tests link in place of the real one, and the means to steer it.
///
/// Work queued on a stream is done late, in order within its stream and in no order between streams: when somebody asks
/// for an event, a few steps are taken, chosen by chance, unless held. A copy reads its source when it lands, not when
/// it is asked for. Device memory cannot be touched but through here. Misuse that the real one would punish with
/// undefined behaviour ends the program with a message.
///
/// Thread safety: all members and all runtime functions from any thread.
class FakeCuda {
 public:
  static FakeCuda& get();

  /// Forgets counts, failures and errors. Requires: no stream, event or registration is left.
  void reset(unsigned seed = 1);

  /// Memory of a device, filled with poison. Freed by reset().
  std::byte* allocate(std::size_t size_bytes, int device = 1);
  std::vector<std::byte> read(const std::byte* device_memory, std::size_t size_bytes);
  bool holds(const std::byte* device_memory, std::span<const std::byte> bytes);
  void write(std::byte* device_memory, std::span<const std::byte> bytes);
  void poison(std::byte* device_memory, std::size_t size_bytes);
  static constexpr std::byte kPoison{0xDD};

  /// While held, no copy lands, nor what is queued behind it.
  void hold(bool held);
  /// Does all that is queued and not behind a kernel.
  void finish_all();

  /// Work of the caller's on a stream (null: the legacy default stream), which goes on until it is ended.
  void start_kernel(cudaStream_t stream);
  void end_kernel(cudaStream_t stream);
  /// Things that have been queued on a stream, by anybody.
  int touches(cudaStream_t stream);

  /// The `nth` next call of `function` (1: the next) gives `error`; when `sticky`, so does every call from then on.
  void fail(const std::string& function, int nth, cudaError_t error, bool sticky = false);
  /// As at the end of a process, until reset(): handles are gone, and every call gives cudaErrorCudartUnloading.
  void unload();
  /// Whether a failure that was asked for has not come yet.
  bool failure_pending();

  int calls(const std::string& function);
  int all_calls();
  int live_streams();
  int live_events();
  int registrations();
  /// Copies from or to host memory that was not page-locked.
  int pageable_copies();
  int most_copies_under_way();

  class Impl;

 private:
  FakeCuda();
  ~FakeCuda();
  std::unique_ptr<Impl> impl_;
};

/// Above zero while the calling thread is inside the fake: what it allocates there is not the library's.
int& fake_cuda_depth();

}  // namespace flashpack::testing
