#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "flashpack/verify.h"
#include "torch_binding/c/arguments.h"
#include "torch_binding/c/errors.h"
#include "torch_binding/c/events.h"
#include "torch_binding/c/handles.h"
#include "torch_binding/c/transfer.h"
#include "torch_binding/format/segments.h"
#include "torch_binding/format/verified.h"

namespace flashpack::c {

namespace {

static_assert(FLASHPACK_CACHE_DIRECT == static_cast<int>(CachePolicy::kDirect));
static_assert(FLASHPACK_CACHE_BUFFERED == static_cast<int>(CachePolicy::kBuffered));
static_assert(FLASHPACK_VERIFY_ALWAYS == static_cast<int>(Verify::kAlways));
static_assert(FLASHPACK_VERIFY_NEVER == static_cast<int>(Verify::kNever));

using Extents = std::vector<std::vector<Extent>>;  // Those of each file.

Extents extents_of(const flashpack_load_request& given, std::size_t file_count) {
  Extents extents(file_count);
  for (const flashpack_extent& extent : array(given.extents, given.extent_count, "request->extents")) {
    if (extent.file >= file_count)
      throw argument_error("an extent of file " + std::to_string(extent.file) + ", of " + std::to_string(file_count));
    if (extent.reserved != 0) throw argument_error("a reserved field of an extent is not 0");
    extents[extent.file].push_back({extent.offset_bytes, extent.size_bytes, extent.target, extent.priority});
  }
  return extents;
}

std::vector<FileExtents> files_by_path(const flashpack_load_request& given, Extents extents) {
  const auto paths = array(given.paths, given.path_count, "request->paths");
  std::vector<FileExtents> files;
  for (std::size_t i = 0; i < paths.size(); ++i) {
    const char* path = &require(paths[i], "an element of request->paths");
    if (extents[i].empty()) continue;
    files.push_back({.path = path, .extents = std::move(extents[i])});
    if (given.fds) files.back().fd = given.fds[i];
    if (given.open_files && given.open_files[i]) files.back().handle = given.open_files[i]->file;
  }
  return files;
}

LoadRequest request_of(const flashpack_load_request& given, std::vector<FileExtents> files) {
  return {.files = std::move(files),
          .cache = one_of(given.cache, CachePolicy::kBuffered, "request->cache"),
          .after = given.drop_cached ? AfterLoad::kDrop : AfterLoad::kKeep,
          .stream = static_cast<CUstream_st*>(given.stream),
          .deadline = deadline_in(given.timeout_ns),
          .continue_on_error = given.continue_on_error != 0,
          .more_streams = streams_in(given.more_streams, given.more_stream_count)};
}

// Lets the transfer know which file of the caller each one of the LoadRequest is.
void remember_files(const flashpack_load_request& given, const Extents& extents, flashpack_transfer& transfer) {
  if (given.reserved != 0) throw argument_error("request->reserved is not 0");
  if (!given.continue_on_error) return;
  if (transfer.verify == Verify::kAlways) throw argument_error("request continues on errors, and verifies always");
  transfer.file_count = extents.size();
  for (std::size_t i = 0; i < extents.size(); ++i) {
    if (!extents[i].empty()) transfer.files.push_back(i);
  }
}

// A caller who gets no transfer could not ask which files have failed.
void refuse_to_continue(const flashpack_load_request* request) {
  if (given(require(request, "request"), "request").continue_on_error)
    throw argument_error("request continues on errors, and there is no transfer to ask about them");
}

// For each file with extents: the caller's indices of its extents, in the order of extents_of().
ExtentIndices indices_of(const flashpack_load_request& given, std::size_t file_count) {
  ExtentIndices indices(file_count);
  for (std::size_t i = 0; i < given.extent_count; ++i) indices[given.extents[i].file].push_back(i);
  std::erase_if(indices, [](const auto& of_file) { return of_file.empty(); });
  return indices;
}

Transfer start(Engine& engine, const flashpack_load_request& given, std::vector<FileExtents> files,
               ExtentIndices indices) {
  LoadRequest request = request_of(given, std::move(files));
  request.report_extents = given.report_extents != 0;
  if (request.report_extents && !given.events) throw argument_error("request reports extents, and has no events");
  if (!given.events) return engine.start_load(std::move(request));
  return given.events->start(given.tag, std::move(indices), [&](EventQueue& queue, std::uint64_t number) {
    return queue.start_load(engine, std::move(request), number);
  });
}

std::unique_ptr<flashpack_transfer> start_load(flashpack_engine* engine, const flashpack_load_request* request) {
  Engine& used = *require(engine, "engine").engine;
  const flashpack_load_request given = c::given(require(request, "request"), "request");
  auto transfer = std::make_unique<flashpack_transfer>();
  transfer->verify = one_of(given.verify, Verify::kNever, "request->verify");
  std::vector<FileExtents> files;
  const std::size_t file_count =
      given.checkpoint ? given.checkpoint->opened->checkpoint.files().size() : given.path_count;
  Extents extents = extents_of(given, file_count);
  remember_files(given, extents, *transfer);
  if (given.checkpoint) {
    if (given.path_count > 0) throw argument_error("request has a checkpoint, and paths");
    transfer->opened = given.checkpoint->opened;
    const Checkpoint& checkpoint = transfer->opened->checkpoint;
    files = files_of(checkpoint, std::move(extents), transfer->verify);
  } else {
    if (transfer->verify == Verify::kAlways) throw argument_error("files that are given by path cannot be verified");
    files = files_by_path(given, std::move(extents));
  }
  ExtentIndices indices = given.report_extents ? indices_of(given, file_count) : ExtentIndices{};
  transfer->transfer = start(used, given, std::move(files), std::move(indices));
  return transfer;
}

// A load of all tensors owns these until the caller gets them.
struct WholeLoad {
  std::unique_ptr<flashpack_tensors> tensors = std::make_unique<flashpack_tensors>();
  std::unique_ptr<flashpack_transfer> transfer = std::make_unique<flashpack_transfer>();
};

Extents allocate(const HostMemoryPool& pool, const Checkpoint& checkpoint, const SegmentPlan& plan, WholeLoad& load) {
  auto memory = std::make_shared<Memory>();
  memory->reserve(plan.blocks.size());
  for (const auto& [size_bytes, phase_bytes] : plan.blocks) memory->emplace_back(pool, size_bytes, phase_bytes);
  std::vector<std::byte*> addresses;
  for (const auto& block : *memory) addresses.push_back(block.data());
  for (const SegmentPlan::Place& place : plan.places) {
    const bool empty = place.segment == SegmentPlan::Place::kNowhere;
    load.tensors->data.push_back(empty ? nullptr
                                       : addresses[plan.segments[place.segment].block] + plan.block_offset(place));
  }
  load.transfer->memory = load.tensors->memory = std::move(memory);
  return plan.extents(addresses, checkpoint.files().size());
}

WholeLoad start_load_all(flashpack_engine* engine, const flashpack_load_request* request) {
  Engine& used = *require(engine, "engine").engine;
  const flashpack_load_request given = c::given(require(request, "request"), "request");
  if (given.path_count > 0 || given.extent_count > 0) throw argument_error("request has paths or extents");
  if (given.report_extents) throw argument_error("request reports extents, and has none of its own");
  WholeLoad load;
  load.transfer->verify = one_of(given.verify, Verify::kNever, "request->verify");
  load.transfer->opened = require(given.checkpoint, "request->checkpoint").opened;
  const Checkpoint& checkpoint = load.transfer->opened->checkpoint;
  std::vector<std::size_t> all(checkpoint.size());
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
  const SegmentPlan plan = plan_segments(checkpoint, all, Device::Kind::kHost, load.transfer->verify);
  Extents extents = allocate(used.options().memory_pool, checkpoint, plan, load);
  remember_files(given, extents, *load.transfer);
  load.transfer->transfer =
      start(used, given, files_of(checkpoint, std::move(extents), load.transfer->verify), ExtentIndices{});
  return load;
}

void give_report(const VerifyReport& found, flashpack_verify_report* report) {
  if (!report) return;
  give(flashpack_verify_report{.verified_bytes = found.verified_bytes,
                               .corrupt_stripes = found.corrupt.size(),
                               .corrupt_offset_bytes =
                                   found.corrupt.empty() ? FLASHPACK_NO_OFFSET : found.corrupt.front().offset_bytes,
                               .seconds = found.seconds},
       report, "report");
}

}  // namespace

}  // namespace flashpack::c

using namespace flashpack::c;

flashpack_status flashpack_open_file_open(flashpack_engine* engine, const char* path, int32_t fd,
                                          flashpack_open_file** file, flashpack_error** error) {
  return guarded(error, [&] {
    auto*& result = result_of(file, "file");
    flashpack::Engine& used = *require(engine, "engine").engine;
    result = new flashpack_open_file{used.open(&require(path, "path"), {}, fd)};
  });
}

flashpack_status flashpack_open_file_get_info(const flashpack_open_file* file, flashpack_open_file_info* info,
                                              flashpack_error** error) {
  return guarded(error, [&] {
    const flashpack::FileHandle& asked = require(file, "file").file;
    give(
        flashpack_open_file_info{.size_bytes = asked.identity().size_bytes, .alignment_bytes = asked.alignment_bytes()},
        info, "info");
  });
}

flashpack_status flashpack_open_file_check(const flashpack_open_file* file, flashpack_error** error) {
  return guarded(error, [&] {
    const flashpack::FileHandle& asked = require(file, "file").file;
    if (const std::error_code code = asked.check()) throw flashpack::internal::file_error(code, "check", asked.path());
  });
}

void flashpack_open_file_destroy(flashpack_open_file* file) { delete file; }

flashpack_status flashpack_start_load(flashpack_engine* engine, const flashpack_load_request* request,
                                      flashpack_transfer** transfer, flashpack_error** error) {
  return guarded(error, [&] {
    auto*& result = result_of(transfer, "transfer");
    result = start_load(engine, request).release();
  });
}

flashpack_status flashpack_load(flashpack_engine* engine, const flashpack_load_request* request,
                                flashpack_error** error) {
  return guarded(error, [&] {
    refuse_to_continue(request);
    wait(*start_load(engine, request));
  });
}

flashpack_status flashpack_start_load_all(flashpack_engine* engine, const flashpack_load_request* request,
                                          flashpack_tensors** tensors, flashpack_transfer** transfer,
                                          flashpack_error** error) {
  return guarded(error, [&] {
    if (transfer) *transfer = nullptr;
    auto*& result = result_of(tensors, "tensors");
    auto*& transfer_result = result_of(transfer, "transfer");
    WholeLoad load = start_load_all(engine, request);
    result = load.tensors.release();
    transfer_result = load.transfer.release();
  });
}

flashpack_status flashpack_load_all(flashpack_engine* engine, const flashpack_load_request* request,
                                    flashpack_tensors** tensors, flashpack_error** error) {
  return guarded(error, [&] {
    auto*& result = result_of(tensors, "tensors");
    refuse_to_continue(request);
    WholeLoad load = start_load_all(engine, request);
    wait(*load.transfer);
    result = load.tensors.release();
  });
}

flashpack_status flashpack_tensors_data(const flashpack_tensors* tensors, size_t index, void** data,
                                        flashpack_error** error) {
  return guarded(error, [&] {
    void*& result = result_of(data, "data");
    const std::vector<void*>& all = require(tensors, "tensors").data;
    if (index >= all.size())
      throw argument_error("there is no tensor " + std::to_string(index) + " of " + std::to_string(all.size()));
    result = all[index];
  });
}

void flashpack_tensors_destroy(flashpack_tensors* tensors) { delete tensors; }

flashpack_status flashpack_verify(flashpack_engine* engine, const flashpack_checkpoint* checkpoint, size_t index,
                                  flashpack_verify_report* report, flashpack_error** error) {
  return guarded(error, [&] {
    flashpack::Engine& used = *require(engine, "engine").engine;
    const auto files = require(checkpoint, "checkpoint").opened->checkpoint.files();
    if (index >= files.size())
      throw argument_error("there is no file " + std::to_string(index) + " of " + std::to_string(files.size()));
    const flashpack::CheckpointFile& file = files[index];
    const auto found = flashpack::verify_payload(used, file.fd.get(), file.path, file.metadata);
    give_report(found, report);
    if (found.corrupt.empty()) return;
    const auto& first = found.corrupt.front();
    throw flashpack::Error(flashpack::Errc::kCorrupt,
                           "verify " + file.path.string() + " at " + std::to_string(first.offset_bytes) + "+" +
                               std::to_string(first.size_bytes) + ", where " + first.tensors + " lies",
                           file.path, first.offset_bytes);
  });
}
