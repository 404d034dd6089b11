#include "torch_binding/libtorch/tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Allocator.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <array>
#include <utility>

#include "flashpack/torch.h"
#include "torch_binding/format/verified.h"

namespace flashpack {

namespace {

// LibTorch has these since 2.7 and 2.8. With older versions the type is Undefined.
template <typename Type>
constexpr Type float8_e8m0() {
  if constexpr (requires { Type::Float8_e8m0fnu; }) return Type::Float8_e8m0fnu;
  return Type::Undefined;
}
template <typename Type>
constexpr Type float4() {
  if constexpr (requires { Type::Float4_e2m1fn_x2; }) return Type::Float4_e2m1fn_x2;
  return Type::Undefined;
}

// Indexed by DType.
constexpr std::array kScalarTypes = {at::ScalarType::Bool,          at::ScalarType::Char,
                                     at::ScalarType::Byte,          at::ScalarType::Short,
                                     at::ScalarType::UInt16,        at::ScalarType::Int,
                                     at::ScalarType::UInt32,        at::ScalarType::Long,
                                     at::ScalarType::UInt64,        at::ScalarType::Half,
                                     at::ScalarType::BFloat16,      at::ScalarType::Float,
                                     at::ScalarType::Double,        at::ScalarType::ComplexHalf,
                                     at::ScalarType::ComplexFloat,  at::ScalarType::ComplexDouble,
                                     at::ScalarType::Float8_e4m3fn, at::ScalarType::Float8_e4m3fnuz,
                                     at::ScalarType::Float8_e5m2,   at::ScalarType::Float8_e5m2fnuz,
                                     float8_e8m0<at::ScalarType>(), float4<at::ScalarType>()};
static_assert(kScalarTypes.size() == static_cast<std::size_t>(DType::kFloat4E2M1FNX2) + 1);

using MemoryOwner = std::shared_ptr<HostMemory>;  // Shared by the tensors in the memory.

std::vector<std::size_t> selected(const Checkpoint& checkpoint, const ReadOptions& options) {
  std::vector<std::size_t> wanted;
  for (std::size_t i = 0; i < checkpoint.size(); ++i) {
    const std::string& name = checkpoint.record(i).name;
    if ((!options.only || options.only->matches(name)) && !options.ignore.matches(name)) wanted.push_back(i);
  }
  return wanted;
}

}  // namespace

at::ScalarType scalar_type(DType dtype) {
  const at::ScalarType type = kScalarTypes[static_cast<std::size_t>(dtype)];
  if (type != at::ScalarType::Undefined) return type;
  throw Error(Errc::kInvalidArgument, "a newer LibTorch is needed for the dtype " + std::string(dtype_name(dtype)));
}

std::optional<DType> format_dtype(at::ScalarType type) noexcept {
  const auto found = std::ranges::find(kScalarTypes, type);
  if (found == kScalarTypes.end() || type == at::ScalarType::Undefined) return std::nullopt;
  return static_cast<DType>(found - kScalarTypes.begin());
}

at::Device device_of(const Engine& engine) {
  const Device& device = engine.options().device;
  if (device.kind == Device::Kind::kHost) return at::kCPU;
  return {at::kCUDA, static_cast<at::DeviceIndex>(device.index)};
}

CUstream_st* current_stream(at::Device device) {
  if (device.is_cpu()) return nullptr;
  const auto* guard = c10::impl::getDeviceGuardImpl(device.type());
  const c10::Stream stream = guard->getStream(device);
  // LibTorch gives the stream's handle since 2.8. With older versions this waits until the stream's work has ended.
  const auto handle = [&](const auto& any) -> CUstream_st* {
    if constexpr (requires { any.native_handle(); }) return static_cast<CUstream_st*>(any.native_handle());
    guard->synchronizeStream(any);
    return nullptr;
  };
  return handle(stream);
}

LoadedRecords::LoadedRecords(Engine& engine, const Checkpoint& checkpoint, std::span<const std::size_t> wanted,
                             CachePolicy cache, Verify verify)
    : checkpoint_(checkpoint),
      wanted_(wanted),
      device_(device_of(engine)),
      plan_(plan_segments(checkpoint, wanted, engine.options().device.kind, verify)) {
  const std::vector<std::byte*> blocks = allocate(engine.options().memory_pool);
  LoadRequest request{.files = files_of(checkpoint, plan_.extents(blocks, checkpoint.files().size()), verify),
                      .cache = cache,
                      .stream = current_stream(device_)};
  stats_ = verified(checkpoint, verify, [&] { return engine.load(std::move(request)); });
}

std::vector<std::byte*> LoadedRecords::allocate(const HostMemoryPool& pool) {
  std::vector<std::byte*> addresses;
  const c10::InferenceMode ordinary_tensors(false);
  for (const auto& [size_bytes, phase_bytes] : plan_.blocks) {
    if (device_.is_cpu()) {
      host_blocks_.push_back(std::make_shared<HostMemory>(pool, size_bytes, phase_bytes));
      addresses.push_back(host_blocks_.back()->data());
    } else {
      device_blocks_.push_back(
          at::empty({static_cast<std::int64_t>(size_bytes)}, at::TensorOptions(device_).dtype(at::kByte)));
      addresses.push_back(static_cast<std::byte*>(device_blocks_.back().mutable_data_ptr()));
    }
  }
  return addresses;
}

at::Tensor LoadedRecords::tensor(std::size_t i) const {
  const TensorRecord& record = checkpoint_.record(wanted_[i]);
  const auto type = scalar_type(record.dtype);
  if (record.size_bytes == 0) return at::empty(record.shape, at::TensorOptions(device_).dtype(type));
  return device_.is_cpu() ? host_tensor(plan_.places[i], record.shape, type)
                          : device_tensor(plan_.places[i], record.shape, type);
}

at::Tensor LoadedRecords::host_tensor(const SegmentPlan::Place& place, at::IntArrayRef shape,
                                      at::ScalarType type) const {
  const MemoryOwner& region = host_blocks_[plan_.segments[place.segment].block];
  auto owner = std::make_unique<MemoryOwner>(region);
  return at::for_blob(region->data() + plan_.block_offset(place), shape)
      .context(owner.release(), [](void* context) { std::unique_ptr<MemoryOwner>(static_cast<MemoryOwner*>(context)); })
      .options(at::TensorOptions(at::kCPU).dtype(type))
      .allocator(c10::GetAllocator(c10::kCPU))  // resize_() moves the tensor to ordinary memory.
      .resizeable_storage()
      .make_tensor();
}

at::Tensor LoadedRecords::device_tensor(const SegmentPlan::Place& place, at::IntArrayRef shape,
                                        at::ScalarType type) const {
  const at::Tensor& block = device_blocks_[plan_.segments[place.segment].block];
  const std::uint64_t begin = plan_.block_offset(place) / c10::elementSize(type);
  // This makes no view, because a view would share its version counter with the other tensors of the block.
  return at::empty({0}, at::TensorOptions(device_).dtype(type))
      .set_(block.storage(), static_cast<std::int64_t>(begin), shape);
}

LoadedTensors read_tensors(Engine& engine, const std::filesystem::path& path, const ReadOptions& options) {
  const Checkpoint checkpoint = open_checkpoint(path);
  const std::vector<std::size_t> wanted = selected(checkpoint, options);
  const LoadedRecords loaded(engine, checkpoint, wanted, options.cache, options.verify);
  // The caller gets ordinary tensors even in inference mode, because he may keep them for longer.
  const c10::InferenceMode ordinary_tensors(false);
  LoadedTensors result{.stats = loaded.stats()};
  result.tensors.reserve(wanted.size());
  for (std::size_t i = 0; i < wanted.size(); ++i)
    result.tensors.emplace_back(checkpoint.record(wanted[i]).name, loaded.tensor(i));
  return result;
}

}  // namespace flashpack
