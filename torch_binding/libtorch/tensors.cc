#include "torch_binding/libtorch/tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Allocator.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <array>
#include <utility>

#include "flashpack/torch.h"
#include "flashpack/verify.h"
#include "torch_binding/format/open_file.h"

namespace flashpack {

namespace {

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
                                     at::ScalarType::Float8_e8m0fnu};
static_assert(kScalarTypes.size() == static_cast<std::size_t>(DType::kFloat8E8M0FNU) + 1);

using RegionOwner = std::shared_ptr<HostRegion>;

// On a device, smaller tensors get memory of their own, so that one that outlives the rest does not keep a segment.
constexpr std::int64_t kMinSharedBytes = std::int64_t{1} << 20;

std::vector<std::size_t> selected(const Metadata& metadata, const ReadOptions& options) {
  std::vector<std::size_t> wanted;
  for (std::size_t i = 0; i < metadata.records.size(); ++i) {
    const std::string& name = metadata.records[i].name;
    if ((!options.only || options.only->matches(name)) && !options.ignore.matches(name)) wanted.push_back(i);
  }
  return wanted;
}

}  // namespace

at::ScalarType scalar_type(DType dtype) noexcept { return kScalarTypes[static_cast<std::size_t>(dtype)]; }

std::optional<DType> format_dtype(at::ScalarType type) noexcept {
  const auto found = std::ranges::find(kScalarTypes, type);
  if (found == kScalarTypes.end()) return std::nullopt;
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
  // LibTorch has told the handle since 2.8; before, all that is on the stream is waited for here.
  const auto handle = [&](const auto& any) -> CUstream_st* {
    if constexpr (requires { any.native_handle(); }) return static_cast<CUstream_st*>(any.native_handle());
    guard->synchronizeStream(any);
    return nullptr;
  };
  return handle(stream);
}

LoadedRecords::LoadedRecords(Engine& engine, int fd, const std::filesystem::path& path, const Metadata& metadata,
                             std::span<const std::size_t> wanted, CachePolicy cache, Verify verify)
    : metadata_(metadata), device_(device_of(engine)), places_(metadata.records.size()) {
  FileExtents file{
      .path = path, .expected = metadata.identity, .checksums = checksums_for(metadata, verify, path), .fd = fd};
  for (const Segment& segment : plan_segments(metadata, wanted, verify)) {
    Place place;
    void* target = nullptr;
    if (device_.is_cpu()) {
      place.region = std::make_shared<HostRegion>(segment.size_bytes, segment.offset_bytes);
      target = place.region->data();
    } else {
      const c10::InferenceMode ordinary_tensors(false);
      const auto size_bytes = static_cast<std::int64_t>(segment.size_bytes);
      place.block = at::empty({size_bytes}, at::TensorOptions(device_).dtype(at::kByte));
      target = place.block.mutable_data_ptr();
    }
    file.extents.push_back({segment.offset_bytes, segment.size_bytes, target});
    for (const std::size_t i : segment.records) {
      place.offset_bytes = metadata.offset_bytes(metadata.records[i]) - segment.offset_bytes;
      places_[i] = place;
    }
  }
  LoadRequest request{.cache = cache, .stream = current_stream(device_)};
  request.files.push_back(std::move(file));
  stats_ = verified(metadata, verify, path, [&] { return engine.load(std::move(request)); });
}

at::Tensor LoadedRecords::tensor(std::size_t record) const {
  const auto type = scalar_type(metadata_.dtype(metadata_.records[record]));
  const std::vector<std::int64_t>& shape = metadata_.records[record].shape;
  const Place& place = places_[record];
  if (place.region) return host_tensor(place, shape, type);
  if (place.block.defined()) return device_tensor(place, shape, type);
  return at::empty(shape, at::TensorOptions(device_).dtype(type));
}

at::Tensor LoadedRecords::host_tensor(const Place& place, at::IntArrayRef shape, at::ScalarType type) const {
  auto owner = std::make_unique<RegionOwner>(place.region);
  at::Tensor tensor =
      at::for_blob(place.region->data() + place.offset_bytes, shape)
          .context(owner.release(),
                   [](void* context) { std::unique_ptr<RegionOwner>(static_cast<RegionOwner*>(context)); })
          .options(at::TensorOptions(at::kCPU).dtype(type))
          .allocator(c10::GetAllocator(c10::kCPU))  // For resize_(), which moves to ordinary memory.
          .resizeable_storage()
          .make_tensor();
  return tensor;
}

at::Tensor LoadedRecords::device_tensor(const Place& place, at::IntArrayRef shape, at::ScalarType type) const {
  const std::uint64_t item_bytes = c10::elementSize(type);
  const auto length_bytes = static_cast<std::int64_t>(item_bytes) * c10::multiply_integers(shape);
  const auto offset = static_cast<std::int64_t>(place.offset_bytes);
  if (place.offset_bytes % item_bytes != 0) {
    // The file was packed more densely than the device can address.
    return place.block.narrow(0, offset, length_bytes).clone().view(type).view(shape);
  }
  // No view, but a tensor with a version counter of its own.
  const at::Tensor tensor = at::empty({0}, at::TensorOptions(device_).dtype(type))
                                .set_(place.block.storage(), offset / static_cast<std::int64_t>(item_bytes), shape);
  return length_bytes < kMinSharedBytes ? tensor.clone() : tensor;
}

LoadedTensors read_tensors(Engine& engine, const std::filesystem::path& path, const ReadOptions& options) {
  const OpenFile file(path);
  const Metadata metadata = read_metadata(file.fd(), path);
  const std::vector<std::size_t> wanted = selected(metadata, options);
  const LoadedRecords loaded(engine, file.fd(), path, metadata, wanted, options.cache, options.verify);
  // What the caller keeps must not depend on the mode it happens to be in.
  const c10::InferenceMode ordinary_tensors(false);
  LoadedTensors result{.stats = loaded.stats()};
  result.tensors.reserve(wanted.size());
  for (const std::size_t i : wanted) result.tensors.emplace_back(metadata.records[i].name, loaded.tensor(i));
  return result;
}

}  // namespace flashpack
