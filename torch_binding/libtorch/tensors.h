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

/// The bytes of chosen records in new memory of the engine's device, from one load.
class LoadedRecords {
 public:
  /// Reads the records at `wanted` of the file, open as `fd`, that `metadata` was read from; it is borrowed. `path` is
  /// for messages. Throws: Error.
  LoadedRecords(Engine& engine, int fd, const std::filesystem::path& path, const Metadata& metadata,
                std::span<const std::size_t> wanted, CachePolicy cache, Verify verify);

  /// A tensor that keeps its segment's memory alive: on the CPU of its own storage, on a device of its segment's unless
  /// it is small. An inference tensor where inference mode is on. Requires: `record` was wanted. To be asked for once
  /// per record: two tensors would share their bytes.
  at::Tensor tensor(std::size_t record) const;

  const TransferStats& stats() const noexcept { return stats_; }

 private:
  struct Place {
    std::shared_ptr<HostRegion> region;  // On the CPU.
    at::Tensor block;                    // On a device: the bytes of a segment.
    std::uint64_t offset_bytes = 0;      // Into either.
  };

  at::Tensor host_tensor(const Place& place, at::IntArrayRef shape, at::ScalarType type) const;
  at::Tensor device_tensor(const Place& place, at::IntArrayRef shape, at::ScalarType type) const;

  const Metadata& metadata_;
  const at::Device device_;
  std::vector<Place> places_;  // By record; of the wanted ones with bytes.
  TransferStats stats_;
};

}  // namespace flashpack
