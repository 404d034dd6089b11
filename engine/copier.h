/// The seam between the loop and memory that the CPU does not reach: slots to a device and back.
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

/// Whether what a caller had put on its stream before it asked for a transfer has come to an end.
class Gate {
 public:
  virtual ~Gate() = default;
  /// Looks once. True from then on when it has; false for not yet. An error is the device's, and the transfer's end.
  /// Thread safety: one thread.
  virtual bool open(std::error_code& error) noexcept = 0;
};

/// Copies between slots and the memory of one device, many under way at a time, each known by its tag. A slot may be
/// used again, and device memory read by anybody, when the copy's completion has been polled.
///
/// Thread safety: members from one thread at a time, the driver, but for those that say otherwise.
class Copier {
 public:
  struct Completion {
    unsigned tag;
    std::error_code error;
  };

  /// Requires: nothing under way.
  virtual ~Copier() = default;

  /// Starts a kScatter or kGather whose view lies in slot `slot` and whose fragments lie in device memory. Never
  /// blocks. Requires: nothing is under way with that slot.
  virtual void push(unsigned tag, unsigned slot, const ByteWork& work) = 0;
  /// What has landed since the last call, in no certain order. The result is valid until the next call.
  virtual std::span<const Completion> poll() = 0;
  virtual bool idle() const noexcept = 0;

  /// Any thread: marks the end of what is on `stream` now, null being the legacy default stream; the stream is not
  /// touched again. Throws: Error when it is being captured into a graph; std::system_error.
  virtual std::unique_ptr<Gate> gate(CUstream_st* stream) = 0;
  /// Any thread: whether `memory` is the device's, and so out of reach for the CPU. Throws: Error for another device's;
  /// std::system_error when the device is past saying.
  virtual bool owns(const void* memory) const = 0;
  /// Any thread: whether the slots are page-locked.
  virtual bool locked() const noexcept = 0;
  /// Any thread: why copies are slower than they could be, as far as it is known by now; empty when they are not.
  virtual std::string fallback_reason() const = 0;
};

/// On the driver thread: the copier of a CUDA device, with `slots`, one region, page-locked as long as it lives.
/// `pool`, which may end first, does the copies that would keep the driver from its work. Throws: std::system_error
/// when there is no such device, no driver, or no CUDA in this build.
std::unique_ptr<Copier> make_cuda_copier(int device, std::span<const std::span<std::byte>> slots, Pool& pool);

/// The NUMA node that a CUDA device is attached to; -1 when there is but one, or none can be told.
int numa_node_of_cuda_device(int device) noexcept;

}  // namespace flashpack::internal
