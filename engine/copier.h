/// Copies between slots and memory of the engine's devices, which the CPU cannot reach.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <system_error>

#include "engine/byte_work.h"
#include "engine/pool.h"

struct CUstream_st;

namespace flashpack::internal {

/// Tells when the work that was on one of the caller's streams at the start of a transfer has ended.
class Gate {
 public:
  virtual ~Gate() = default;
  /// Looks once, without waiting. True if the work has ended. `error` is set if the device failed, which ends the
  /// transfer. Thread safety: one thread.
  virtual bool is_open(std::error_code& error) noexcept = 0;
};

/// Copies between slots and the memory of one or more devices. Many copies may be under way; each is known by its tag.
/// When a copy's completion has been polled, its slot may be used again and any stream may read its device memory. A
/// device that fails fails its own copies only. push(), poll() and idle() are about copies, and the other functions
/// about the devices.
///
/// Thread safety: only the driver thread calls the members, except those that say otherwise.
class Copier {
 public:
  struct EndedCopy {
    unsigned tag;
    std::error_code error;
  };

  /// Requires: no copy is under way.
  virtual ~Copier() = default;

  /// Starts a kScatter or kGather whose view lies in slot `slot` and whose fragments lie in memory of one device.
  /// Never blocks. Requires: nothing is under way with that slot.
  virtual void push(unsigned tag, unsigned slot, const ByteWork& work) = 0;
  /// The copies that have ended since the last call, in any order. The result is valid until the next call.
  virtual std::span<const EndedCopy> poll() = 0;
  /// Whether no copy is under way.
  virtual bool idle() const noexcept = 0;

  /// Any thread: marks the end of the work that is now on `stream`, a stream of that device; null is its legacy default
  /// stream. The stream is not touched afterwards. Throws: Error when the stream is being captured into a graph;
  /// std::system_error.
  virtual std::unique_ptr<Gate> gate(DeviceNumber device, CUstream_st* stream) = 0;
  /// Any thread: the device that copies to and from `memory`; kHost if that is memory of the host. Throws: Error for
  /// memory of a device that this does not serve; std::system_error when no device answers any more.
  virtual DeviceNumber device_of(const void* memory) const = 0;
  /// Any thread: the number of devices, which is the highest DeviceNumber.
  virtual DeviceNumber devices() const noexcept = 0;
  /// Any thread: whether the slots are page-locked.
  virtual bool locked() const noexcept = 0;
  /// Any thread: why copies are slower than they could be, as far as known; empty when they are not.
  virtual std::string fallback_reason() const = 0;
};

/// On the driver thread: makes the copier of these CUDA devices, whose DeviceNumbers are in this order. `slots` are
/// contiguous, and are page-locked for all devices as long as the copier lives. If they are the caller's and
/// page-locked already, they are left as they are. `pool`, which may end first, does the copies that would hold up the
/// driver. Throws: std::system_error when there is no such device, no driver, or no CUDA in this build.
std::unique_ptr<Copier> make_cuda_copier(std::span<const int> devices, std::span<const std::span<std::byte>> slots,
                                         Pool& pool, bool callers_memory = false);

/// Any thread: the NUMA node that a CUDA device is attached to; -1 if there is only one node or the node is unknown.
int numa_node_of_cuda_device(int device) noexcept;

}  // namespace flashpack::internal
