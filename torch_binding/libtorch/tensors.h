/// Turns bytes of a file into tensors that behave as if torch had made them.
///
/// Thread safety: any thread may call the functions; a LoadedRecords is for one thread at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "flashpack/checkpoint.h"
#include "flashpack/engine.h"
#include "flashpack/host_memory.h"
#include "torch_binding/format/segments.h"

namespace flashpack {

/// Throws: Error (kInvalidArgument) for a dtype that this LibTorch lacks.
at::ScalarType scalar_type(DType dtype);
/// Empty for types that the format does not have: quantised and bit types.
std::optional<DType> format_dtype(at::ScalarType type) noexcept;

/// The device that an engine loads to.
at::Device device_of(const Engine& engine);
/// The calling thread's current stream on `device`, to be passed to the engine; null for the CPU. Before LibTorch 2.8
/// it cannot be had: then this waits until its work has ended, and returns null, the legacy default stream.
CUstream_st* current_stream(at::Device device);

/// Loads chosen tensors of a checkpoint into new memory of the engine's device. Checkpoint and `wanted` are borrowed.
class LoadedRecords {
 public:
  /// Reads the tensors with the indices in `wanted`, and waits for them. Throws: Error; c10::Error when torch has no
  /// memory on the device.
  LoadedRecords(Engine& engine, const Checkpoint& checkpoint, std::span<const std::size_t> wanted, CachePolicy cache,
                Verify verify);

  /// The tensor at wanted[i]. It keeps its block's memory alive. On the CPU it has its own storage, on a
  /// device the storage of its block. It is an inference tensor if inference mode is on. To be called once per tensor,
  /// because two tensors would share their bytes.
  at::Tensor tensor(std::size_t i) const;

  const TransferStats& stats() const noexcept { return stats_; }

 private:
  /// Allocates the blocks, and returns their addresses.
  std::vector<std::byte*> allocate(const HostMemoryPool& pool);
  at::Tensor host_tensor(const SegmentPlan::Place& place, at::IntArrayRef shape, at::ScalarType type) const;
  at::Tensor device_tensor(const SegmentPlan::Place& place, at::IntArrayRef shape, at::ScalarType type) const;

  const Checkpoint& checkpoint_;
  const std::span<const std::size_t> wanted_;
  const at::Device device_;
  const SegmentPlan plan_;
  std::vector<std::shared_ptr<HostMemory>> host_blocks_;  // The plan's on the CPU; shared with the tensors in them.
  std::vector<at::Tensor> device_blocks_;                 // The blocks of the plan on a device.
  TransferStats stats_;
};

}  // namespace flashpack
