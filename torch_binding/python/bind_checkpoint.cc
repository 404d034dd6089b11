#include "bind_checkpoint.h"

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include "footer_objects.h"
#include "native_calls.h"
#include "torch_binding/format/codec.h"
#include "torch_binding/format/index.h"
#include "torch_binding/format/segments.h"
#include "torch_binding/format/verified.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashpack {

namespace {

namespace fs = std::filesystem;

/// dev, ino, size_bytes, mtime_ns.
using IdentityTuple = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, std::int64_t>;
/// Path, descriptor, identity, format, whether it has checksums, where the payload begins.
using FileTuple = std::tuple<fs::path, int, IdentityTuple, std::string_view, bool, std::uint64_t>;
/// Path, format, JSON of the footer or header, and where the payload ends.
using HeaderTuple = std::tuple<fs::path, std::string, std::string, std::uint64_t>;
/// Size of a block in bytes, and its phase.
using BlockTuple = std::tuple<std::uint64_t, std::uint64_t>;
/// Indices of blocks, and offsets in the blocks in bytes. Two lists of numbers cost Python's garbage collector nothing.
using PlacesTuple = std::tuple<std::vector<std::size_t>, std::vector<std::uint64_t>>;

template <typename Path>
PyCheckpoint open(const Path& path) {
  const NativeCall call;
  nb::gil_scoped_release released;
  return PyCheckpoint(open_checkpoint(path));
}

PyCheckpoint open_files(const std::vector<fs::path>& paths) { return open(std::span<const fs::path>(paths)); }

WeightMap read(const fs::path& index) {
  const NativeCall call;
  nb::gil_scoped_release released;
  return read_index(index);
}

/// File, and the names of its tensors.
using ShardTuple = std::tuple<fs::path, std::vector<std::string>>;
/// Index of the file, and of the name.
using PlaceInShardsTuple = std::tuple<std::uint32_t, std::uint32_t>;

std::vector<PlaceInShardsTuple> places_in_shards(const std::vector<ShardTuple>& files, const fs::path& path,
                                                 const WeightMap& weight_map) {
  std::vector<Shard> shards;
  for (const auto& [file, names] : files)
    shards.emplace_back(file, std::vector<std::string_view>{names.begin(), names.end()});
  std::vector<PlaceInShardsTuple> tuples;
  for (const auto& [shard, name] : places_in(shards, path, weight_map)) tuples.emplace_back(shard, name);
  return tuples;
}

/// Text that is not Unicode is no name.
bool is_plain(const nb::str& name) {
  Py_ssize_t size = 0;
  const char* utf8 = PyUnicode_AsUTF8AndSize(name.ptr(), &size);
  if (utf8 == nullptr) PyErr_Clear();
  return utf8 != nullptr && is_plain_name({utf8, static_cast<std::size_t>(size)});
}

PyCheckpoint of_headers(const fs::path& path, const std::vector<HeaderTuple>& headers, const WeightMap& weight_map) {
  const NativeCall call;
  nb::gil_scoped_release released;
  std::vector<CheckpointFile> files;
  for (const auto& [file, format, json, payload_bytes] : headers)
    files.push_back({.path = file, .metadata = codec_called(format).parse(json, payload_bytes, file)});
  return PyCheckpoint(Checkpoint(path, std::move(files), weight_map));
}

Error system_error_of(const std::string& operation, const fs::path& path) {
  return {std::error_code(errno, std::generic_category()), operation + " " + path.string(), path};
}

IdentityTuple identity_tuple(const FileIdentity& identity) {
  const auto& [dev, ino, size_bytes, mtime_ns] = identity;
  return {dev, ino, size_bytes, mtime_ns};
}

IdentityTuple identity_now(int fd, const fs::path& path) {
  const NativeCall call;
  std::optional<FileIdentity> identity;
  int error = 0;
  {
    nb::gil_scoped_release released;  // The server of a network file system is asked.
    identity = identity_of(fd);
    error = errno;
  }
  if (!identity) throw Error({error, std::generic_category()}, "stat " + path.string(), path);
  return identity_tuple(*identity);
}

int open_for_python(const fs::path& path) {
  const NativeCall call;
  for (;;) {
    int fd = -1;
    int error = 0;
    {
      nb::gil_scoped_release released;
      fd = open_to_read(path);
      error = errno;
    }
    if (fd >= 0) return fd;
    if (error != EINTR) throw Error({error, std::generic_category()}, "open " + path.string(), path);
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

std::vector<HeaderTuple> headers_of(const PyCheckpoint& checkpoint) {
  const NativeCall call;
  const auto opened = checkpoint.get();
  nb::gil_scoped_release released;
  std::vector<HeaderTuple> headers;
  for (const CheckpointFile& file : opened->files()) {
    JsonOfFile again = read_json(file.fd.get(), file.path, kMaxFooterBytes);
    if (again.identity != file.metadata.identity)
      throw Error(Errc::kFileChanged, "read " + file.path.string(), file.path);
    headers.emplace_back(file.path, again.codec.name, std::move(again.json), again.payload_bytes);
  }
  return headers;
}

/// Returns the file of each tensor, for checkpoints whose index decided which of several files is meant; else nothing.
WeightMap weight_map_of(const PyCheckpoint& checkpoint) {
  const auto opened = checkpoint.get();
  std::size_t records = 0;
  for (const CheckpointFile& file : opened->files()) records += file.metadata.records.size();
  WeightMap map;
  for (std::size_t i = 0; records != opened->size() && i < opened->size(); ++i)
    map.emplace(opened->record(i).name, opened->files()[opened->file_of(i)].path.filename().string());
  return map;
}

/// The records of a safetensors file cover its payload, so that the first of them begins where that does.
std::uint64_t payload_begin_of(const Metadata& metadata) {
  const bool has_header = metadata.format == FileFormat::kSafetensors && !metadata.records.empty();
  return has_header ? metadata.records.front().offset_bytes : 0;
}

std::vector<FileTuple> file_tuples(const PyCheckpoint& checkpoint) {
  std::vector<FileTuple> tuples;
  for (const auto& [path, metadata, fd] : checkpoint.get()->files())
    tuples.emplace_back(path, fd.get(), identity_tuple(metadata.identity), format_name(metadata.format),
                        metadata.checksums.has_value(), payload_begin_of(metadata));
  return tuples;
}

const Metadata& only_file(const Checkpoint& checkpoint) {
  const Metadata& metadata = checkpoint.files().front().metadata;
  const bool several = checkpoint.files().size() > 1;
  if (!several && metadata.format == FileFormat::kFlashPack) return metadata;
  const std::string what = several ? "a checkpoint of several files" : "a safetensors file";
  throw Error(
      Errc::kInvalidArgument,
      checkpoint.path().string() + " is " + what +
          ", which has no flashpack footer and no macroblocks: load_file, open_file and assign_from_file take it");
}

PyCheckpoint macroblocks_of(const PyCheckpoint& checkpoint) {
  const auto opened = checkpoint.get();
  const CheckpointFile& file = opened->files().front();
  Metadata blocks = macroblocks_as_records(only_file(*opened));
  blocks.identity = file.metadata.identity;
  blocks.checksums = file.metadata.checksums;
  UniqueFd fd(file.fd ? ::fcntl(file.fd.get(), F_DUPFD_CLOEXEC, 0) : -1);
  if (file.fd && !fd) throw system_error_of("open", file.path);
  std::vector<CheckpointFile> files;
  files.push_back({file.path, std::move(blocks), std::move(fd)});
  return PyCheckpoint(Checkpoint(file.path, std::move(files)));
}

/// Path, and a sentence about its file.
using WarningTuple = std::tuple<fs::path, std::string>;

std::uint64_t payload_bytes_of(const PyCheckpoint& checkpoint) {
  std::uint64_t sum = 0;
  for (const CheckpointFile& file : checkpoint.get()->files()) sum += file.metadata.payload_bytes;
  return sum;
}

std::vector<WarningTuple> warnings_of(const PyCheckpoint& checkpoint) {
  std::vector<WarningTuple> all;
  for (const CheckpointFile& file : checkpoint.get()->files())
    for (const std::string& warning : file.metadata.warnings) all.emplace_back(file.path, warning);
  return all;
}

SegmentPlan plan(const PyCheckpoint& checkpoint, const std::vector<std::size_t>& wanted, bool on_device,
                 std::string_view verify, std::uint64_t max_segment_bytes) {
  const auto kind = on_device ? Device::Kind::kCuda : Device::Kind::kHost;
  const auto opened = checkpoint.get();
  std::vector<bool> taken(opened->size());
  for (const std::size_t i : wanted) {
    if (i >= taken.size()) throw nb::index_error("there is no such tensor");
    if (taken[i]) throw Error(Errc::kInvalidArgument, "a tensor is wanted twice");
    taken[i] = true;
  }
  return plan_segments(*opened, wanted, kind, verify_policy(verify), max_segment_bytes);
}

std::vector<BlockTuple> blocks_of(const SegmentPlan& plan) {
  std::vector<BlockTuple> blocks;
  for (const auto& [size_bytes, phase_bytes] : plan.blocks) blocks.emplace_back(size_bytes, phase_bytes);
  return blocks;
}

PlacesTuple places_in_blocks(const SegmentPlan& plan) {
  PlacesTuple places;
  auto& [blocks, offsets] = places;
  for (const SegmentPlan::Place& place : plan.places) {
    const bool empty = place.segment == SegmentPlan::Place::kNowhere;
    blocks.push_back(empty ? 0 : plan.segments[place.segment].block);
    offsets.push_back(empty ? 0 : plan.block_offset(place));
  }
  return places;
}

std::vector<ReadTuple> reads_of(const SegmentPlan& plan, const std::vector<std::uintptr_t>& addresses) {
  if (addresses.size() != plan.blocks.size()) throw Error(Errc::kInvalidArgument, "every block has one address");
  std::vector<ReadTuple> reads;
  reads.reserve(plan.segments.size());
  for (const Segment& segment : plan.segments) {
    reads.emplace_back(segment.file, segment.offset_bytes, segment.size_bytes,
                       addresses[segment.block] + segment.block_offset);
  }
  return reads;
}

void bind_files(nb::module_& module) {
  module.def("open_to_read", &open_for_python, "path"_a,
             "Opens a file and returns its descriptor. A FIFO is not waited for; the holder of a write lease is.");
  module.def("identity_of", &identity_now, "fd"_a, "path"_a,
             "(device, inode, size in bytes, mtime in nanoseconds) of an open file, as the file system has them now. "
             "The path is for messages.");
  module.def("is_index", &is_index, "path"_a, "Whether a file has the name of an index.");
  module.def("without_index_suffix", &without_index_suffix, "path"_a,
             "model.safetensors for model.safetensors.index.json and its like; other paths as they are.");
  module.def("is_plain_name", &is_plain, "name"_a, "Whether a file may name another one so, which is then beside it.");
}

void bind_plan(nb::module_& module) {
  nb::class_<SegmentPlan>(module, "SegmentPlan",
                          "The bytes to read for tensors of a checkpoint, and the blocks of memory that they go to.")
      .def_prop_ro("blocks", &blocks_of,
                   "(size in bytes, phase) of each; on the host the address has to be the phase modulo the page.")
      .def_prop_ro("places", &places_in_blocks,
                   "The block of each wanted tensor, and the offset in that block in bytes; without meaning for "
                   "empty tensors.")
      .def("reads", &reads_of, "addresses"_a,
           "What a load reads into blocks at these addresses: (index of the file, file offset, size, address).");
}

}  // namespace

std::shared_ptr<const Checkpoint> PyCheckpoint::get() const {
  if (!opened_) throw nb::value_error("I/O operation on closed file");  // As Python's own files say.
  return opened_;
}

Verify verify_policy(std::string_view name) {
  if (name == "auto") return Verify::kAuto;
  if (name == "always") return Verify::kAlways;
  if (name == "never") return Verify::kNever;
  throw Error(Errc::kInvalidArgument, "verify must be auto, always or never, got " + std::string(name));
}

std::vector<FileExtents> files_of(const Checkpoint& checkpoint, const std::vector<ReadTuple>& reads, Verify verify) {
  std::vector<std::vector<Extent>> extents(checkpoint.files().size());
  for (const auto& [file, offset_bytes, size_bytes, address] : reads) {
    if (file >= extents.size()) throw nb::index_error("there is no such file");
    void* const target = reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
    extents[file].push_back({offset_bytes, size_bytes, target});
  }
  return files_of(checkpoint, std::move(extents), verify);
}

void bind_checkpoint(nb::module_& module) {
  module.attr("MAX_SEGMENT_BYTES") = kMaxSegmentBytes;
  bind_plan(module);
  bind_files(module);
  nb::class_<PyCheckpoint>(module, "Checkpoint", "The tensors of one or several files, which are open.")
      .def_prop_ro("files", &file_tuples,
                   "(path, descriptor, (device, inode, size in bytes, mtime in nanoseconds), format, whether it has "
                   "checksums, where the payload begins) of each file.")
      .def_prop_ro("payload_bytes", &payload_bytes_of)
      .def_prop_ro(
          "user_metadata", [](const PyCheckpoint& self) { return self.get()->user_metadata(); },
          "Text that the authors of the files put in, where the files do not contradict each other.")
      .def_prop_ro("warnings", &warnings_of, "(path, sentence) of each harmless oddity.")
      .def_prop_ro("macroblocks", &macroblocks_of,
                   "The only file of this checkpoint, with each macroblock as if it were one tensor of one dim.")
      .def_prop_ro("headers", &headers_of, "What checkpoint_of_headers() takes.")
      .def_prop_ro("weight_map", &weight_map_of, "The same.")
      .def(
          "to_dict", [](const PyCheckpoint& self) { return footer_dict(only_file(*self.get())); },
          "The keys of the footer of the only file, which is a flashpack file.")
      .def(
          "entries",
          [](const PyCheckpoint& self, const nb::type_object& type) { return entries_of(*self.get(), type); }, "type"_a,
          "The tensors, file by file and in file order, each as a `type`, which is a tuple of name, dtype, shape, file "
          "offset, size in bytes, index, and index of the file.")
      .def("plan", &plan, "wanted"_a, "on_device"_a, "verify"_a = "auto", "max_segment_bytes"_a = kMaxSegmentBytes,
           "Plans what to read for the tensors at these indices, and where it goes.")
      .def("close", &PyCheckpoint::close, "Closes the files once no transfer needs them.");
  module.def("open_checkpoint", &open<fs::path>, "path"_a, "Opens a file, an index of files, or a directory.");
  module.def("open_files", &open_files, "paths"_a, "Opens several files as one checkpoint.");
  module.def(
      "places_in_shards", &places_in_shards, "files"_a, "path"_a, "weight_map"_a,
      "The tensors of (path, names) files that make up the checkpoint `path`, as (index of the file, index of the "
      "name).");
  module.def("read_index", &read, "path"_a,
             "The name of the file that has each tensor. The files may be of any format, and are not opened.");
  module.def("checkpoint_of_headers", &of_headers, "path"_a, "headers"_a, "weight_map"_a,
             "A checkpoint that another process has opened, from (path, format, JSON of footer or header, end of the "
             "payload).");
}

}  // namespace flashpack
