#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <optional>
#include <span>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/ground/host_region.h"
#include "flashpack/format.h"
#include "flashpack/torch.h"
#include "torch_binding/format/pack_plan.h"
#include "torch_binding/libtorch/casts.h"
#include "torch_binding/libtorch/tensors.h"

namespace flashpack {

namespace {

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
  return plan_file(specs, options.align_bytes, options.name_order, options.metadata, options.checksum);
}

// A tensor, and the place of its values in the file.
struct Item {
  at::Tensor tensor;
  at::ScalarType type;
  std::uint64_t offset_bytes;
};

bool is_here(const at::Tensor& tensor, at::Device device) { return tensor.device() == device && !device.is_cpu(); }

PackSource source_of(const Item& item, at::Device device) {
  const at::Tensor& tensor = item.tensor;
  const bool is_near = tensor.is_cpu() || tensor.device() == device;
  const bool is_final = is_near && tensor.scalar_type() == item.type && !tensor.is_conj() && !tensor.is_neg();
  return {.form = PackSource::form_of(tensor.is_contiguous(), is_final, tensor.dim() <= 1 || tensor.stride(-1) == 1),
          .on_device = is_here(tensor, device),
          .element_bytes = static_cast<std::uint32_t>(c10::elementSize(item.type)),
          .offset_bytes = item.offset_bytes,
          .shape = {tensor.sizes().data(), tensor.sizes().size()}};
}

at::Tensor piece_of(at::Tensor tensor, const PackStep& step) {
  auto first = static_cast<std::int64_t>(step.first_elem);
  const auto elems = static_cast<std::int64_t>(step.elems);
  if (tensor.is_contiguous()) return tensor.view(-1).narrow(0, first, elems);
  while (tensor.numel() > elems) {
    const std::int64_t row_elems = tensor.numel() / tensor.size(0);
    const std::int64_t row = first / row_elems;
    if (elems > row_elems) return tensor.narrow(0, row, elems / row_elems);
    tensor = tensor.select(0, row);
    first -= row * row_elems;
  }
  return tensor;
}

// Memory for converted values.
class Buffer {
 public:
  explicit Buffer(at::Device device) {
    constexpr auto kSize = static_cast<std::int64_t>(kPackBufferBytes);
    if (device.is_cpu()) {
      memory_.emplace(kPackBufferBytes, "packing");
      bytes_ = at::from_blob(memory_->data(), {kSize}, at::kByte);
    } else {
      bytes_ = at::empty({kSize}, at::TensorOptions(device).dtype(at::kByte));
    }
  }

  // Returns the values of `part` as they go to the file.
  at::Tensor convert(const at::Tensor& part, at::ScalarType type, const PackStep& step) {
    // torch cannot copy some types of a byte, such as pairs of 4-bit floats that are not contiguous.
    if (type != at::kByte && part.scalar_type() == type && part.element_size() == 1)
      return convert(part.view(at::kByte), at::kByte, step);
    const at::Tensor place = at_bytes(*step.buffer_offset_bytes, part.numel(), type);
    if (step.scratch_offset_bytes) {
      const at::Tensor order = at::empty_like(part, part.options().dtype(type).device(at::kMeta));
      const at::Tensor dense =
          at_bytes(*step.scratch_offset_bytes, part.numel(), type).as_strided(part.sizes(), order.strides());
      place.view(part.sizes()).copy_(dense.copy_(part));
    } else if (part.is_cpu() && part.is_contiguous()) {
      const at::Tensor flat = part.view(-1);
      for (std::int64_t i = 0; i < flat.numel(); i += kPackSerialElems) {
        const std::int64_t count = std::min(kPackSerialElems, flat.numel() - i);
        place.narrow(0, i, count).copy_(flat.narrow(0, i, count));
      }
    } else {
      place.view(part.sizes()).copy_(part);
    }
    return place;
  }

 private:
  at::Tensor at_bytes(std::uint64_t begin, std::int64_t elems, at::ScalarType type) const {
    const auto size = elems * static_cast<std::int64_t>(c10::elementSize(type));
    return bytes_.narrow(0, static_cast<std::int64_t>(begin), size).view(type);
  }

  std::optional<internal::HostRegion> memory_;
  at::Tensor bytes_;
};

// Writes the groups of a plan, and fills the next group while others are being written.
class GroupWriter {
 public:
  /// `device` is the device of the engine.
  GroupWriter(FileWriter& file, at::Device device) : file_(file), device_(device) {}

  void write(const PackGroup& steps, std::span<const Item> items) {
    Group group = writing_.size() < kPackGroups - 1 ? Group{} : wait();
    std::vector<SourceExtent> extents;
    for (const PackStep& step : steps) {
      const Item& item = items[step.source];
      const at::Tensor values = step.buffer_offset_bytes ? convert(group, item, step) : item.tensor;
      const std::uint64_t offset_bytes = item.offset_bytes + step.first_elem * c10::elementSize(item.type);
      extents.push_back({offset_bytes, values.nbytes(), values.const_data_ptr()});
      group.owners.push_back(values);
    }
    group.transfer = file_.start_write({.extents = std::move(extents), .stream = current_stream(device_)});
    writing_.push_back(std::move(group));
  }

  // Waits for all writes, and returns the sums of their statistics.
  TransferStats finish() {
    while (!writing_.empty()) wait();
    return std::move(stats_);
  }

 private:
  // The memory of one write. The group that comes kPackGroups later uses its buffers again.
  struct Group {
    std::vector<at::Tensor> owners;
    std::optional<Buffer> on_host;
    std::optional<Buffer> on_device;
    Transfer transfer;  // The last member, because it borrows from the others until it is destroyed.
  };

  at::Tensor convert(Group& group, const Item& item, const PackStep& step) const {
    const bool here = is_here(item.tensor, device_);
    std::optional<Buffer>& buffer = here ? group.on_device : group.on_host;
    if (!buffer) buffer.emplace(here ? device_ : at::Device(at::kCPU));
    return buffer->convert(piece_of(item.tensor, step), item.type, step);
  }

  // Waits for the oldest write.
  Group wait() {
    Group group = std::move(writing_.front());
    writing_.pop_front();
    stats_ += std::exchange(group.transfer, {}).wait();
    group.owners.clear();
    return group;
  }

  FileWriter& file_;
  const at::Device device_;
  TransferStats stats_;
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
  std::vector<Item> items;
  std::vector<PackSource> sources;
  for (const TensorRecord& record : metadata.records) {
    items.push_back({*tensor_of.at(record.name), scalar_type(record.dtype), record.offset_bytes});
    sources.push_back(source_of(items.back(), device_of(engine)));
  }
  GroupWriter writer(file, device_of(engine));
  for (const PackGroup& group : plan_pack(sources)) writer.write(group, items);
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
