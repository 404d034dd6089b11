#include "torch_binding/tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Allocator.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <array>
#include <utility>

#include "flashpack/torch.h"

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

LoadedRecords::LoadedRecords(Engine& engine, const std::filesystem::path& path, const Metadata& metadata,
                             std::span<const std::size_t> wanted, CachePolicy cache)
    : metadata_(metadata), places_(metadata.records.size()) {
  FileExtents file{.path = path, .expected = metadata.identity};
  for (const Segment& segment : plan_segments(metadata, wanted)) {
    const auto region = std::make_shared<HostRegion>(segment.size_bytes, segment.offset_bytes);
    file.extents.push_back({segment.offset_bytes, segment.size_bytes, region->data()});
    const std::byte* previous = nullptr;
    for (const std::size_t i : segment.records) {
      const std::uint64_t offset_bytes = metadata.offset_bytes(metadata.records[i]) - segment.offset_bytes;
      std::byte* const data = region->data() + offset_bytes;
      // Records overlap wholly or not at all, and a segment has them by offset.
      places_[i] = {.region = region, .data = data, .is_alias = data == previous};
      previous = data;
    }
  }
  LoadRequest request{.cache = cache};
  request.files.push_back(std::move(file));
  stats_ = engine.load(std::move(request));
}

at::Tensor LoadedRecords::tensor(std::size_t record) const {
  const auto type = scalar_type(metadata_.dtype(metadata_.records[record]));
  const std::vector<std::int64_t>& shape = metadata_.records[record].shape;
  const Place& place = places_[record];
  if (!place.region) return at::empty(shape, at::TensorOptions(at::kCPU).dtype(type));
  auto owner = std::make_unique<RegionOwner>(place.region);
  at::Tensor tensor =
      at::for_blob(place.data, shape)
          .context(owner.release(),
                   [](void* context) { std::unique_ptr<RegionOwner>(static_cast<RegionOwner*>(context)); })
          .options(at::TensorOptions(at::kCPU).dtype(type))
          .allocator(c10::GetAllocator(c10::kCPU))  // For resize_(), which moves to ordinary memory.
          .resizeable_storage()
          .make_tensor();
  // Whoever writes to one tensor must not change another.
  return place.is_alias ? tensor.clone() : tensor;
}

LoadedTensors read_tensors(Engine& engine, const std::filesystem::path& path, const ReadOptions& options) {
  const Metadata metadata = read_metadata(path);
  const std::vector<std::size_t> wanted = selected(metadata, options);
  const LoadedRecords loaded(engine, path, metadata, wanted, options.cache);
  // What the caller keeps must not depend on the mode it happens to be in.
  const c10::InferenceMode ordinary_tensors(false);
  LoadedTensors result{.stats = loaded.stats()};
  result.tensors.reserve(wanted.size());
  for (const std::size_t i : wanted) result.tensors.emplace_back(metadata.records[i].name, loaded.tensor(i));
  return result;
}

}  // namespace flashpack
