#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "flashpack/format.h"
#include "torch_binding/c/arguments.h"
#include "torch_binding/c/errors.h"
#include "torch_binding/c/events.h"
#include "torch_binding/c/handles.h"
#include "torch_binding/c/transfer.h"
#include "torch_binding/format/pack_plan.h"

namespace flashpack::c {

namespace {

std::unique_ptr<flashpack_transfer> start_write(flashpack_writer* writer, const flashpack_write_request* request) {
  FileWriter& used = require(writer, "writer").writer;
  const flashpack_write_request given = c::given(require(request, "request"), "request");
  WriteRequest write{.stream = static_cast<CUstream_st*>(given.stream),
                     .deadline = deadline_in(given.timeout_ns),
                     .more_streams = streams_in(given.more_streams, given.more_stream_count)};
  for (const flashpack_source& source : array(given.sources, given.source_count, "request->sources"))
    write.extents.push_back({source.offset_bytes, source.size_bytes, source.source});
  auto transfer = std::make_unique<flashpack_transfer>();
  const auto by_events = [&](EventQueue& queue, std::uint64_t number) {
    return queue.start_write(used, std::move(write), number);
  };
  transfer->transfer =
      given.events ? given.events->start(given.tag, ExtentIndices{}, by_events) : used.start_write(std::move(write));
  return transfer;
}

std::string_view name_of(const flashpack_save_tensor& tensor) {
  const auto name = array(tensor.name, tensor.name_bytes, "the name of a tensor");
  return {name.begin(), name.end()};
}

std::vector<TensorSpec> specs_of(std::span<const flashpack_save_tensor> tensors) {
  std::vector<TensorSpec> specs;
  for (const flashpack_save_tensor& tensor : tensors) {
    if (tensor.reserved != 0) throw argument_error("a reserved field of a tensor is not 0");
    const auto shape = array(tensor.shape, tensor.dims, "the shape of a tensor");
    specs.push_back({.name = std::string(name_of(tensor)),
                     .dtype = one_of(tensor.dtype, DType::kFloat4E2M1FNX2, "the dtype of a tensor"),
                     .shape = {shape.begin(), shape.end()}});
  }
  return specs;
}

void save(Engine& engine, const char* path, std::span<const flashpack_save_tensor> tensors,
          const flashpack_save_options& options) {
  if (options.reserved != 0) throw argument_error("options->reserved is not 0");
  const bool checksums = options.no_checksums == 0;
  const std::uint64_t align_bytes = options.align_bytes != 0 ? options.align_bytes : kDefaultAlignBytes;
  Metadata metadata = plan_file(specs_of(tensors), align_bytes, std::nullopt, {}, checksums);
  std::unordered_map<std::string_view, const void*> data_of;
  for (const flashpack_save_tensor& tensor : tensors) data_of.emplace(name_of(tensor), tensor.data);
  WriteRequest write{.stream = static_cast<CUstream_st*>(options.stream),
                     .more_streams = streams_in(options.more_streams, options.more_stream_count)};
  for (const TensorRecord& record : metadata.records) {
    if (record.size_bytes > 0)
      write.extents.push_back({record.offset_bytes, record.size_bytes, data_of.at(record.name)});
  }
  FileWriter writer = engine.create(path, {.payload_bytes = metadata.payload_bytes, .checksums = checksums});
  writer.write(std::move(write));
  if (checksums) metadata.checksums = writer.checksums();
  const std::string footer = encode_footer(metadata);
  writer.commit(std::as_bytes(std::span(footer)));
}

}  // namespace

}  // namespace flashpack::c

using namespace flashpack::c;

flashpack_status flashpack_writer_create(flashpack_engine* engine, const char* path,
                                         const flashpack_writer_options* options, flashpack_writer** writer,
                                         flashpack_error** error) {
  return guarded(error, [&] {
    auto*& result = result_of(writer, "writer");
    const std::shared_ptr<flashpack::Engine>& used = require(engine, "engine").engine;
    const auto given = given_or_default(options, "options");
    if (given.reserved != 0) throw argument_error("options->reserved is not 0");
    result = new flashpack_writer{
        used, used->create(&require(path, "path"),
                           {.payload_bytes = given.payload_bytes, .follow_links = given.replace_link == 0})};
  });
}

flashpack_status flashpack_start_write(flashpack_writer* writer, const flashpack_write_request* request,
                                       flashpack_transfer** transfer, flashpack_error** error) {
  return guarded(error, [&] {
    auto*& result = result_of(transfer, "transfer");
    result = start_write(writer, request).release();
  });
}

flashpack_status flashpack_write(flashpack_writer* writer, const flashpack_write_request* request,
                                 flashpack_error** error) {
  return guarded(error, [&] { wait(*start_write(writer, request)); });
}

flashpack_status flashpack_writer_commit(flashpack_writer* writer, const void* tail, size_t tail_bytes,
                                         flashpack_error** error) {
  return guarded(error, [&] {
    flashpack::FileWriter& used = require(writer, "writer").writer;
    used.commit(array(static_cast<const std::byte*>(tail), tail_bytes, "tail"));
  });
}

void flashpack_writer_destroy(flashpack_writer* writer) { delete writer; }

flashpack_status flashpack_save(flashpack_engine* engine, const char* path, const flashpack_save_tensor* tensors,
                                size_t tensor_count, const flashpack_save_options* options, flashpack_error** error) {
  return guarded(error, [&] {
    flashpack::Engine& used = *require(engine, "engine").engine;
    save(used, &require(path, "path"), array(tensors, tensor_count, "tensors"), given_or_default(options, "options"));
  });
}
