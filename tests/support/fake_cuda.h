#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace flashpack::testing {

/// The CUDA runtime that tests link in place of the real one, and the means to steer it.
///
/// Work queued on a stream is done late, in order within its stream and in no order between streams, but for the legacy
/// default stream and those that it waits for: when somebody asks for an event, a few steps are taken, chosen by
/// chance, unless held. A copy of page-locked memory reads its source when it lands, not when it is asked for; one of
/// other memory reads it within the call, and may keep its caller until it has landed. Device memory cannot be touched
/// but through here. A call on a thread without a context makes one, on the thread's device. A call that may wait
/// breaks the captures of graphs that forbid it to its thread. Misuse that the real one would punish with undefined
/// behaviour ends the program with a message.
///
/// Thread safety: all members and all runtime functions from any thread.
class FakeCuda {
 public:
  static FakeCuda& get();

  /// Forgets counts, failures, errors and contexts. Requires: no stream, event or registration is left.
  void reset(unsigned seed = 1);

  /// Memory of a device, filled with poison. Freed by reset().
  std::byte* allocate(std::size_t size_bytes, int device = 1);
  /// One range of addresses over several allocations, as of cuMemMap: multiples of 4096 bytes.
  std::byte* allocate_mapped(std::initializer_list<std::size_t> sizes_bytes, int device = 1);
  std::vector<std::byte> read(const std::byte* device_memory, std::size_t size_bytes);
  bool holds(const std::byte* device_memory, std::span<const std::byte> bytes);
  void write(std::byte* device_memory, std::span<const std::byte> bytes);
  void poison(std::byte* device_memory, std::size_t size_bytes);
  bool is_poison(const std::byte* device_memory, std::size_t size_bytes);
  static constexpr std::byte kPoison{0xDD};

  /// While held, no copy lands, nor what is queued behind it.
  void hold(bool held);
  /// Does all that is queued and not behind a kernel.
  void finish_all();

  /// Work of the caller's on a stream (null: the legacy default stream of that device), which goes on until it is
  /// ended.
  void start_kernel(cudaStream_t stream, int device = 1);
  void end_kernel(cudaStream_t stream, int device = 1);
  /// Things that have been queued on a stream, by anybody.
  int touches(cudaStream_t stream);
  /// Things that have become part of the graph that a stream is captured into.
  int captured(cudaStream_t stream);

  /// The `nth` next call of `function` (1: the next) gives `error`, and `times - 1` more; when `sticky`, the context of
  /// the call fails, and so does every call in it from then on. With cudaSuccess nothing fails any more.
  void fail(const std::string& function, int nth, cudaError_t error, bool sticky = false, int times = 1);
  /// As at the end of a process, until reset(): handles are gone, and every call gives cudaErrorCudartUnloading.
  void unload();
  /// From now on each call in the context of a device gives `error`. The hardware stops its copies.
  void fail_context(int device, cudaError_t error);
  /// The context of a device goes with all that is in it, and those who ask for it are told. A driver may also crash,
  /// as this fake does when somebody asks after a cudaDeviceReset().
  void lose_context(int device);
  /// Sees so many devices until reset(): at most three, at first two. A slice of a device (MIG) is a single one.
  void show_devices(int count);
  /// Whether a failure that was asked for has not come yet.
  bool failure_pending();

  int calls(const std::string& function);
  int all_calls();
  /// Whether a thread of that name has called it.
  bool called_by(const std::string& function, const std::string& thread);
  bool has_context(int device);
  int live_streams();
  int live_events();
  int registrations();
  /// Copies from or to host memory that was not page-locked.
  int pageable_copies();
  int most_copies_under_way();
  int copies_under_way(int device);

  class Impl;

 private:
  FakeCuda();
  ~FakeCuda();
  std::unique_ptr<Impl> impl_;
};

}  // namespace flashpack::testing
