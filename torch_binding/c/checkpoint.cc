#include "flashpack/checkpoint.h"

#include <filesystem>
#include <utility>
#include <vector>

#include "torch_binding/c/arguments.h"
#include "torch_binding/c/errors.h"
#include "torch_binding/c/handles.h"

namespace flashpack::c {

namespace {

static_assert(FLASHPACK_DTYPE_BOOL == static_cast<int>(DType::kBool));
static_assert(FLASHPACK_DTYPE_INT8 == static_cast<int>(DType::kInt8));
static_assert(FLASHPACK_DTYPE_UINT8 == static_cast<int>(DType::kUInt8));
static_assert(FLASHPACK_DTYPE_INT16 == static_cast<int>(DType::kInt16));
static_assert(FLASHPACK_DTYPE_UINT16 == static_cast<int>(DType::kUInt16));
static_assert(FLASHPACK_DTYPE_INT32 == static_cast<int>(DType::kInt32));
static_assert(FLASHPACK_DTYPE_UINT32 == static_cast<int>(DType::kUInt32));
static_assert(FLASHPACK_DTYPE_INT64 == static_cast<int>(DType::kInt64));
static_assert(FLASHPACK_DTYPE_UINT64 == static_cast<int>(DType::kUInt64));
static_assert(FLASHPACK_DTYPE_FLOAT16 == static_cast<int>(DType::kFloat16));
static_assert(FLASHPACK_DTYPE_BFLOAT16 == static_cast<int>(DType::kBFloat16));
static_assert(FLASHPACK_DTYPE_FLOAT32 == static_cast<int>(DType::kFloat32));
static_assert(FLASHPACK_DTYPE_FLOAT64 == static_cast<int>(DType::kFloat64));
static_assert(FLASHPACK_DTYPE_COMPLEX32 == static_cast<int>(DType::kComplex32));
static_assert(FLASHPACK_DTYPE_COMPLEX64 == static_cast<int>(DType::kComplex64));
static_assert(FLASHPACK_DTYPE_COMPLEX128 == static_cast<int>(DType::kComplex128));
static_assert(FLASHPACK_DTYPE_FLOAT8_E4M3FN == static_cast<int>(DType::kFloat8E4M3FN));
static_assert(FLASHPACK_DTYPE_FLOAT8_E4M3FNUZ == static_cast<int>(DType::kFloat8E4M3FNUZ));
static_assert(FLASHPACK_DTYPE_FLOAT8_E5M2 == static_cast<int>(DType::kFloat8E5M2));
static_assert(FLASHPACK_DTYPE_FLOAT8_E5M2FNUZ == static_cast<int>(DType::kFloat8E5M2FNUZ));
static_assert(FLASHPACK_DTYPE_FLOAT8_E8M0FNU == static_cast<int>(DType::kFloat8E8M0FNU));
static_assert(FLASHPACK_DTYPE_FLOAT4_E2M1FN_X2 == static_cast<int>(DType::kFloat4E2M1FNX2));

// Other languages make slices, for which null is no address, even if they are empty.
constexpr std::int64_t kNoDims = 0;

template <typename Elements>
auto& at(Elements& elements, std::size_t index, const char* what) {
  if (index < elements.size()) return elements[index];
  throw argument_error("there is no " + std::string(what) + " " + std::to_string(index) + " in a checkpoint of " +
                       std::to_string(elements.size()));
}

const OpenCheckpoint& opened(const flashpack_checkpoint* checkpoint) {
  return *require(checkpoint, "checkpoint").opened;
}

}  // namespace

OpenCheckpoint::OpenCheckpoint(Checkpoint made) : checkpoint(std::move(made)), metadata(checkpoint.user_metadata()) {
  for (const auto& entry : metadata) metadata_by_index.push_back(&entry);
  for (std::size_t i = 0; i < checkpoint.size(); ++i) index_of.emplace(checkpoint.record(i).name, i);
}

}  // namespace flashpack::c

using namespace flashpack::c;

flashpack_status flashpack_checkpoint_open(const char* path, flashpack_checkpoint** checkpoint,
                                           flashpack_error** error) {
  return guarded(error, [&] {
    auto*& result = result_of(checkpoint, "checkpoint");
    auto opened = flashpack::open_checkpoint(std::filesystem::path(&require(path, "path")));
    result = new flashpack_checkpoint{std::make_shared<const OpenCheckpoint>(std::move(opened))};
  });
}

flashpack_status flashpack_checkpoint_open_files(const char* const* paths, size_t path_count,
                                                 flashpack_checkpoint** checkpoint, flashpack_error** error) {
  return guarded(error, [&] {
    auto*& result = result_of(checkpoint, "checkpoint");
    std::vector<std::filesystem::path> files;
    for (const char* path : array(paths, path_count, "paths"))
      files.emplace_back(&require(path, "an element of paths"));
    if (files.empty()) throw argument_error("path_count is 0");
    auto opened = flashpack::open_checkpoint(files);
    result = new flashpack_checkpoint{std::make_shared<const OpenCheckpoint>(std::move(opened))};
  });
}

flashpack_status flashpack_checkpoint_get_info(const flashpack_checkpoint* checkpoint, flashpack_checkpoint_info* info,
                                               flashpack_error** error) {
  return guarded(error, [&] {
    const OpenCheckpoint& asked = opened(checkpoint);
    give(flashpack_checkpoint_info{.file_count = asked.checkpoint.files().size(),
                                   .tensor_count = asked.checkpoint.size(),
                                   .metadata_count = asked.metadata.size()},
         info, "info");
  });
}

flashpack_status flashpack_checkpoint_get_file(const flashpack_checkpoint* checkpoint, size_t index,
                                               flashpack_file* file, flashpack_error** error) {
  return guarded(error, [&] {
    const auto files = opened(checkpoint).checkpoint.files();
    const flashpack::CheckpointFile& asked = at(files, index, "file");
    give(flashpack_file{.path = asked.path.c_str(),
                        .format = flashpack::format_name(asked.metadata.format).data(),
                        .size_bytes = asked.metadata.identity.size_bytes,
                        .payload_bytes = asked.metadata.payload_bytes,
                        .fd = asked.fd.get(),
                        .has_checksums = asked.metadata.checksums.has_value()},
         file, "file");
  });
}

flashpack_status flashpack_checkpoint_get_tensor(const flashpack_checkpoint* checkpoint, size_t index,
                                                 flashpack_tensor* tensor, flashpack_error** error) {
  return guarded(error, [&] {
    const flashpack::Checkpoint& asked = opened(checkpoint).checkpoint;
    if (index >= asked.size())
      throw argument_error("there is no tensor " + std::to_string(index) + " in a checkpoint of " +
                           std::to_string(asked.size()));
    const flashpack::TensorRecord& record = asked.record(index);
    give(flashpack_tensor{.name = record.name.c_str(),
                          .name_bytes = record.name.size(),
                          .dtype_name = flashpack::dtype_name(record.dtype).data(),
                          .dtype = static_cast<int32_t>(record.dtype),
                          .element_bytes = flashpack::element_bytes(record.dtype),
                          .shape = record.shape.empty() ? &kNoDims : record.shape.data(),
                          .dims = record.shape.size(),
                          .file = asked.file_of(index),
                          .offset_bytes = record.offset_bytes,
                          .size_bytes = record.size_bytes},
         tensor, "tensor");
  });
}

flashpack_status flashpack_checkpoint_get_metadata(const flashpack_checkpoint* checkpoint, size_t index,
                                                   flashpack_metadata* metadata, flashpack_error** error) {
  return guarded(error, [&] {
    const auto& [key, value] = *at(opened(checkpoint).metadata_by_index, index, "entry of metadata");
    give(
        flashpack_metadata{
            .key = key.c_str(), .key_bytes = key.size(), .value = value.c_str(), .value_bytes = value.size()},
        metadata, "metadata");
  });
}

flashpack_status flashpack_checkpoint_find(const flashpack_checkpoint* checkpoint, const char* name, size_t name_bytes,
                                           size_t* index, flashpack_error** error) {
  return guarded(error, [&] {
    const OpenCheckpoint& asked = opened(checkpoint);
    size_t& result = require(index, "index");
    const auto chars = array(name, name_bytes, "name");
    const std::string wanted(chars.begin(), chars.end());
    const auto found = asked.index_of.find(wanted);
    if (found == asked.index_of.end())
      throw NotFound(asked.checkpoint.path().string() + " has no tensor \"" + wanted + "\"");
    result = found->second;
  });
}

void flashpack_checkpoint_destroy(flashpack_checkpoint* checkpoint) { delete checkpoint; }
