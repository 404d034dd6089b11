#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "flashpack/format.h"
#include "flashpack/torch.h"
#include "torch_binding/format/segments.h"
#include "torch_binding/libtorch/casts.h"
#include "torch_binding/libtorch/tensors.h"

namespace flashpack {

namespace {

// What has to be converted goes through buffers of this size. While one is being filled the others are being written,
// which keeps the disk's queue full.
constexpr std::uint64_t kBufferBytes = std::uint64_t{16} << 20;
constexpr std::size_t kGroupsAlive = 4;
constexpr std::uint64_t kPageBytes = 4096;
// torch converts fewer than 32768 elements without starting threads.
constexpr std::int64_t kSerialElems = 32767;
// Of a tensor that is larger than a buffer.
constexpr std::uint64_t kPartBytes = kBufferBytes / 4;

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
  const at::ScalarType asked = options.target_dtype.value_or(tensor.scalar_type());
  if (!format_dtype(asked))
    refuse(path, name, "cannot be stored: Unsupported dtype " + std::string(c10::toString(asked)));
  if (asked != tensor.scalar_type() && c10::isIntegralType(asked, /*includeBool=*/true))
    refuse(path, name, "could lose values in a cast to " + std::string(c10::toString(asked)));
  const at::ScalarType type = type_when_asked(tensor.scalar_type(), options.target_dtype);
  const std::optional<DType> dtype = format_dtype(type);
  if (!dtype) refuse(path, name, "cannot be stored: Unsupported dtype " + std::string(c10::toString(type)));
  return {.name = name, .dtype = *dtype, .shape = tensor.sizes().vec()};
}

Metadata layout_of(const StateDict& tensors, const std::filesystem::path& path, const PackOptions& options) {
  std::vector<TensorSpec> specs;
  for (const auto& [name, tensor] : tensors) specs.push_back(spec_of(name, tensor, path, options));
  std::vector<TensorSpec> ordered;
  for (const std::size_t i : file_order(specs, options.name_order)) ordered.push_back(std::move(specs[i]));
  Metadata metadata = make_layout(ordered, options.align_bytes);
  metadata.user_metadata = options.metadata;
  check_footer(metadata, options.checksum);
  return metadata;
}

// Whether neighbours in the file are far from each other in memory. It then takes its room in a buffer twice.
bool is_transposed(const at::Tensor& tensor) { return tensor.dim() > 1 && tensor.stride(-1) != 1; }

// Memory for converted values, which lie in it as in the file, modulo a page, to be written from there without another
// copy.
class Buffer {
 public:
  explicit Buffer(at::Device device) {
    if (device.is_cpu()) {
      memory_ = std::make_unique<HostRegion>(kBufferBytes, 0);
      bytes_ = at::from_blob(memory_->data(), {static_cast<std::int64_t>(kBufferBytes)}, at::kByte);
    } else {
      bytes_ = at::empty({static_cast<std::int64_t>(kBufferBytes)}, at::TensorOptions(device).dtype(at::kByte));
    }
  }

  void clear() { used_bytes_ = 0; }

  // The values of `tensor` as they go to the file at `offset_bytes`; empty when there is no room for them.
  std::optional<at::Tensor> convert(const at::Tensor& tensor, at::ScalarType type, std::uint64_t offset_bytes) {
    const std::uint64_t begin = used_bytes_ + (offset_bytes - used_bytes_) % kPageBytes;
    const std::uint64_t size = static_cast<std::uint64_t>(tensor.numel()) * c10::elementSize(type);
    const std::uint64_t end = begin + size;
    const std::uint64_t scratch = (end + kPageBytes - 1) / kPageBytes * kPageBytes;
    const bool needs_scratch = tensor.is_cpu() && is_transposed(tensor);
    if ((needs_scratch ? scratch + size : end) > kBufferBytes) return std::nullopt;
    used_bytes_ = end;
    const at::Tensor place = at_bytes(begin, size, type);
    if (needs_scratch) {
      // torch transposes quickly what is dense, and slowly what is cut out of something larger.
      const at::Tensor order = at::empty_like(tensor, tensor.options().dtype(type).device(at::kMeta));
      const at::Tensor dense = at_bytes(scratch, size, type).as_strided(tensor.sizes(), order.strides());
      return place.view(tensor.sizes()).copy_(dense.copy_(tensor));
    }
    if (tensor.is_cpu() && tensor.is_contiguous()) {
      // One core converts faster than disks write; more would spin for each other.
      const at::Tensor flat = tensor.view(-1);
      for (std::int64_t i = 0; i < flat.numel(); i += kSerialElems) {
        const std::int64_t count = std::min(kSerialElems, flat.numel() - i);
        place.narrow(0, i, count).copy_(flat.narrow(0, i, count));
      }
      return place.view(tensor.sizes());
    }
    return place.view(tensor.sizes()).copy_(tensor);
  }

 private:
  at::Tensor at_bytes(std::uint64_t begin, std::uint64_t size, at::ScalarType type) const {
    return bytes_.narrow(0, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(size)).view(type);
  }

  std::unique_ptr<HostRegion> memory_;
  at::Tensor bytes_;
  std::uint64_t used_bytes_ = 0;
};

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
    while (!writing_.empty()) wait();
    return std::move(stats_);
  }

 private:
  // What one write is made of. Its buffers go to the group that comes kGroupsAlive later.
  struct Group {
    std::vector<SourceExtent> extents;
    std::vector<at::Tensor> owners;
    std::optional<Buffer> on_host;
    std::optional<Buffer> on_device;
    Transfer transfer;  // Last: it borrows from the others until destroyed.
  };

  void push(const at::Tensor& tensor, std::uint64_t offset_bytes) {
    filling_.extents.push_back({offset_bytes, tensor.nbytes(), tensor.const_data_ptr()});
    filling_.owners.push_back(tensor);
  }

  void add_converted(const at::Tensor& tensor, at::ScalarType type, std::uint64_t offset_bytes) {
    const std::uint64_t size_bytes = static_cast<std::uint64_t>(tensor.numel()) * c10::elementSize(type);
    if (size_bytes > (is_transposed(tensor) ? kBufferBytes / 2 : kBufferBytes) - kPageBytes)
      return add_parts(tensor, type, offset_bytes, size_bytes);
    std::optional<at::Tensor> converted = buffer_for(tensor).convert(tensor, type, offset_bytes);
    if (!converted) {
      start_group();
      converted = buffer_for(tensor).convert(tensor, type, offset_bytes);
    }
    push(*converted, offset_bytes);
  }

  // Cuts along the first dimension until a part fits, so that the copy of a large tensor is never whole.
  void add_parts(const at::Tensor& tensor, at::ScalarType type, std::uint64_t offset_bytes, std::uint64_t size_bytes) {
    const at::Tensor rows = tensor.is_contiguous() ? tensor.view(-1) : tensor;
    const std::uint64_t row_bytes = size_bytes / static_cast<std::uint64_t>(rows.size(0));
    for (std::int64_t row = 0; row < rows.size(0);) {
      const std::uint64_t at = offset_bytes + static_cast<std::uint64_t>(row) * row_bytes;
      // As far as the next multiple of a part in the file, so that whole chunks are written.
      const auto fitting = static_cast<std::int64_t>((kPartBytes - at % kPartBytes) / row_bytes);
      const std::int64_t count = std::clamp<std::int64_t>(fitting, 1, rows.size(0) - row);
      add_converted(count == 1 ? rows.select(0, row) : rows.narrow(0, row, count), type, at);
      row += count;
    }
  }

  Buffer& buffer_for(const at::Tensor& tensor) {
    const bool here = tensor.device() == device_ && !device_.is_cpu();
    std::optional<Buffer>& buffer = here ? filling_.on_device : filling_.on_host;
    if (!buffer) buffer.emplace(here ? device_ : at::Device(at::kCPU));
    return *buffer;
  }

  void start_group() {
    if (filling_.extents.empty()) return;
    filling_.transfer =
        file_.start_write({.extents = std::exchange(filling_.extents, {}), .stream = current_stream(device_)});
    writing_.push_back(std::exchange(filling_, {}));
    if (writing_.size() < kGroupsAlive) return;
    filling_ = wait();
    for (std::optional<Buffer>* buffer : {&filling_.on_host, &filling_.on_device}) {
      if (*buffer) (*buffer)->clear();
    }
  }

  // For the oldest write.
  Group wait() {
    Group group = std::move(writing_.front());
    writing_.pop_front();
    const TransferStats part = std::exchange(group.transfer, {}).wait();
    group.owners.clear();
    stats_.requested_bytes += part.requested_bytes;
    stats_.direct_bytes += part.direct_bytes;
    stats_.buffered_bytes += part.buffered_bytes;
    stats_.staged_bytes += part.staged_bytes;
    stats_.operations += part.operations;
    stats_.retries += part.retries;
    stats_.pinned = part.pinned;
    stats_.backend = part.backend;
    if (stats_.fallback_reason.empty()) stats_.fallback_reason = part.fallback_reason;
    return group;
  }

  FileWriter& file_;
  const at::Device device_;
  TransferStats stats_;
  Group filling_;
  std::deque<Group> writing_;
};

}  // namespace

TransferStats pack_to_file(Engine& engine, const StateDict& tensors, const std::filesystem::path& path,
                           const PackOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  Metadata metadata = layout_of(tensors, path, options);
  std::unordered_map<std::string_view, const at::Tensor*> tensor_of;
  for (const auto& [name, tensor] : tensors) tensor_of.emplace(name, &tensor);

  FileWriter file = engine.create(path, {.payload_bytes = metadata.payload_bytes, .checksums = options.checksum});
  const c10::NoGradGuard no_grad;
  TensorWriter writer(file, device_of(engine));
  for (const TensorRecord& record : metadata.records) {
    writer.add(*tensor_of.at(record.name), scalar_type(record.dtype), record.offset_bytes);
  }
  TransferStats stats = writer.finish();
  if (options.checksum) metadata.checksums = file.checksums();
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
