/// From bytes of a file to tensors that behave as if torch had made them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "flashpack/engine.h"
#include "flashpack/format.h"
#include "torch_binding/format/segments.h"

namespace flashpack {

at::ScalarType scalar_type(DType dtype) noexcept;
/// Empty for what the format does not have: quantised, bit and 4-bit types.
std::optional<DType> format_dtype(at::ScalarType type) noexcept;

/// Where an engine's loads end.
at::Device device_of(const Engine& engine);
/// What torch puts the caller's work for `device` on, to be passed to the engine; null for the CPU.
CUstream_st* current_stream(at::Device device);

/// The bytes of chosen records in new memory of the engine's device, from one load. Metadata and `wanted` are borrowed.
class LoadedRecords {
 public:
  /// Reads the records at `wanted` of the file, open as `fd`, that `metadata` was read from. `path` is for messages.
  /// Throws: Error.
  LoadedRecords(Engine& engine, int fd, const std::filesystem::path& path, const Metadata& metadata,
                std::span<const std::size_t> wanted, CachePolicy cache, Verify verify);

  /// The tensor of the record at wanted[i]. It keeps its block's memory alive: on the CPU it has a storage of its own,
  /// on a device that of its block. An inference tensor where inference mode is on. To be asked for once per record:
  /// two tensors would share their bytes.
  at::Tensor tensor(std::size_t i) const;

  const TransferStats& stats() const noexcept { return stats_; }

 private:
  /// Allocates the blocks, and returns where each begins.
  std::vector<std::byte*> allocate();
  at::Tensor host_tensor(const SegmentPlan::Place& place, at::IntArrayRef shape, at::ScalarType type) const;
  at::Tensor device_tensor(const SegmentPlan::Place& place, at::IntArrayRef shape, at::ScalarType type) const;

  const Metadata& metadata_;
  const std::span<const std::size_t> wanted_;
  const at::Device device_;
  const SegmentPlan plan_;
  std::vector<std::shared_ptr<HostRegion>> regions_;  // On the CPU: the blocks of the plan.
  std::vector<at::Tensor> blocks_;                    // On a device.
  TransferStats stats_;
};

}  // namespace flashpack
