#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <span>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "flashpack/format.h"
#include "flashpack/torch.h"
#include "torch_binding/tensors.h"

namespace flashpack {

namespace {

// Copies of one group are made while those of the group before are written.
constexpr std::uint64_t kGroupBytes = std::uint64_t{32} << 20;

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& name, const std::string& cause) {
  throw Error(Errc::kInvalidArgument, "pack " + path.string() + ": tensor '" + name + "' " + cause, path);
}

TensorSpec spec_of(const std::string& name, const at::Tensor& tensor, const std::filesystem::path& path,
                   const PackOptions& options) {
  if (!tensor.defined()) refuse(path, name, "is undefined");
  if (tensor.layout() != at::kStrided || tensor.is_nested())
    refuse(path, name, "is not dense: layout " + c10::str(tensor.layout()));
  if (tensor.is_meta()) refuse(path, name, "is on the meta device and has no data");
  if (tensor.is_quantized())
    refuse(path, name, "is quantised: Unsupported dtype " + std::string(c10::toString(tensor.scalar_type())));
  const at::ScalarType type = options.target_dtype.value_or(tensor.scalar_type());
  const std::optional<DType> dtype = format_dtype(type);
  if (!dtype) refuse(path, name, "cannot be stored: Unsupported dtype " + std::string(c10::toString(type)));
  return {.name = name, .dtype = *dtype, .shape = tensor.sizes().vec()};
}

Metadata layout_of(const StateDict& tensors, const std::filesystem::path& path, const PackOptions& options) {
  std::vector<TensorSpec> specs;
  for (const auto& [name, tensor] : tensors) specs.push_back(spec_of(name, tensor, path, options));
  std::vector<TensorSpec> ordered;
  for (const std::size_t i : file_order(specs, options.name_order)) ordered.push_back(std::move(specs[i]));
  return make_layout(ordered, options.align_bytes);
}

// Streams tensors to a file, converting those that are not yet what the file holds.
class TensorWriter {
 public:
  /// `device` is the engine's: tensors there need not come to the CPU first.
  TensorWriter(FileWriter& file, at::Device device) : file_(file), device_(device) {}

  void add(const at::Tensor& tensor, at::ScalarType type, std::uint64_t offset_bytes) {
    if (tensor.numel() == 0) return;
    const bool ready = (tensor.is_cpu() || tensor.device() == device_) && tensor.scalar_type() == type &&
                       tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
    if (ready) {
      push(tensor, offset_bytes);
    } else {
      add_converted(tensor, type, offset_bytes);
    }
  }

  // Writes what is left and returns the sums of all writes.
  TransferStats finish() {
    start_group();
    wait();
    return std::move(stats_);
  }

 private:
  struct Group {
    std::vector<SourceExtent> extents;
    std::vector<at::Tensor> owners;
    std::uint64_t copied_bytes = 0;
  };

  void push(const at::Tensor& tensor, std::uint64_t offset_bytes) {
    filling_.extents.push_back({offset_bytes, tensor.nbytes(), tensor.const_data_ptr()});
    filling_.owners.push_back(tensor);
  }

  // Cuts along the first dimension until a slice fits, so that the copy of a large tensor is never whole.
  void add_converted(const at::Tensor& tensor, at::ScalarType type, std::uint64_t offset_bytes) {
    const std::uint64_t size_bytes = static_cast<std::uint64_t>(tensor.numel()) * c10::elementSize(type);
    if (size_bytes > kGroupBytes) return add_sliced(tensor, type, offset_bytes, size_bytes);
    if (filling_.copied_bytes + size_bytes > kGroupBytes) start_group();
    filling_.copied_bytes += size_bytes;
    const at::Tensor cast = tensor.to(at::TensorOptions(at::kCPU).dtype(type), /*non_blocking=*/false, /*copy=*/false,
                                      at::MemoryFormat::Contiguous);
    push(cast.resolve_conj().resolve_neg().contiguous(), offset_bytes);
  }

  void add_sliced(const at::Tensor& tensor, at::ScalarType type, std::uint64_t offset_bytes, std::uint64_t size_bytes) {
    const std::int64_t rows = tensor.size(0);
    const std::uint64_t row_bytes = size_bytes / static_cast<std::uint64_t>(rows);
    const auto rows_per_slice = std::max<std::int64_t>(1, static_cast<std::int64_t>(kGroupBytes / row_bytes));
    for (std::int64_t row = 0; row < rows; row += rows_per_slice) {
      const std::int64_t count = std::min(rows_per_slice, rows - row);
      const at::Tensor slice = count == 1 ? tensor.select(0, row) : tensor.narrow(0, row, count);
      add_converted(slice, type, offset_bytes + static_cast<std::uint64_t>(row) * row_bytes);
    }
  }

  void start_group() {
    wait();
    writing_ = std::exchange(filling_, {});
    if (!writing_.extents.empty()) {
      transfer_ = file_.start_write(std::move(writing_.extents), nullptr, current_stream(device_));
    }
  }

  void wait() {
    if (!transfer_.valid()) return;
    const TransferStats part = std::exchange(transfer_, {}).wait();
    stats_.requested_bytes += part.requested_bytes;
    stats_.direct_bytes += part.direct_bytes;
    stats_.buffered_bytes += part.buffered_bytes;
    stats_.staged_bytes += part.staged_bytes;
    stats_.operations += part.operations;
    stats_.retries += part.retries;
    stats_.backend = part.backend;
    if (stats_.fallback_reason.empty()) stats_.fallback_reason = part.fallback_reason;
  }

  FileWriter& file_;
  const at::Device device_;
  TransferStats stats_;
  Group filling_;
  Group writing_;
  Transfer transfer_;  // Last: it borrows from writing_ until destroyed.
};

}  // namespace

TransferStats pack_to_file(Engine& engine, const StateDict& tensors, const std::filesystem::path& path,
                           const PackOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  const Metadata metadata = layout_of(tensors, path, options);
  std::unordered_map<std::string_view, const at::Tensor*> tensor_of;
  for (const auto& [name, tensor] : tensors) tensor_of.emplace(name, &tensor);

  FileWriter file = engine.create(path, {.payload_bytes = metadata.payload_bytes});
  const c10::NoGradGuard no_grad;
  TensorWriter writer(file, device_of(engine));
  for (const TensorRecord& record : metadata.records) {
    writer.add(*tensor_of.at(record.name), scalar_type(metadata.dtype(record)), metadata.offset_bytes(record));
  }
  TransferStats stats = writer.finish();
  const std::string footer = encode_footer(metadata);
  file.commit(std::as_bytes(std::span(footer)));
  stats.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return stats;
}

TransferStats pack_to_file(Engine& engine, const ::torch::nn::Module& module, const std::filesystem::path& path,
                           const PackOptions& options) {
  return pack_to_file(engine, state_dict(module), path, options);
}

}  // namespace flashpack
