/// Packs tensors and modules of LibTorch into flashpack files, and loads them from any checkpoint.
///
///   flashpack::Engine engine;
///   flashpack::pack_to_file(engine, *model, "model.flashpack");
///   flashpack::assign_from_file(engine, *model, "model.flashpack");
///   flashpack::assign_from_file(engine, *model, "llama/");  // with model.safetensors.index.json
///
/// Every function here blocks, and throws Error, or c10::Error when torch itself fails (mostly for lack of memory).
/// After an exception the module and the file at the destination are unchanged, unless the error says otherwise.
///
/// Thread safety: any thread may call, with one engine or several; a module or tensor belongs to one call at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "flashpack/checksums.h"
#include "flashpack/engine.h"
#include "flashpack/format.h"
#include "flashpack/name_filter.h"

namespace torch::nn {
class Module;
}

namespace flashpack {

/// Tensors by name, in order. Names are unique.
using StateDict = std::vector<std::pair<std::string, at::Tensor>>;

/// The module's parameters and buffers in the order of Python's state_dict(): a module's own parameters, its own
/// buffers, then its children. A tied tensor appears under each of its names. The tensors are not copies.
StateDict state_dict(const ::torch::nn::Module& module);

struct PackOptions {
  /// A floating-point type casts the floating-point tensors, a complex type the complex ones, and an integer type is an
  /// error. Integers and 8-bit floats are never cast, because they may be packed or quantised weights.
  std::optional<at::ScalarType> target_dtype;
  /// Order of the tensors in the file; tensors that it does not list are left out. If empty, the largest come first.
  std::optional<std::vector<std::string>> name_order;
  std::uint64_t align_bytes = kDefaultAlignBytes;  ///< Each tensor begins at a multiple of it; 0 packs densely.
  /// Puts checksums of the payload into the footer; readers that do not know them skip them. Without checksums and
  /// metadata the file is byte for byte what the Python reference writes.
  bool checksum = true;
  /// UTF-8 text for the footer; readers get it as Metadata::user_metadata.
  std::map<std::string, std::string> metadata;
};

/// Writes `tensors` to a new file that replaces `path` when it is complete and durable. The directory must exist.
///
/// Tensors may be on any device and have any strides; the file holds them contiguous and row-major. A tensor that must
/// be converted is converted part by part, with at most 64 MiB of copies alive. Tensors on the engine's own CUDA device
/// are copied from there while the file is written. Tensors must not change during the call. Throws: Error
/// (kInvalidArgument) that names the tensor if one is undefined, sparse, meta, or of a dtype that the format does not
/// have; the errors of make_layout() and FileWriter.
TransferStats pack_to_file(Engine& engine, const StateDict& tensors, const std::filesystem::path& path,
                           const PackOptions& options = {});

/// The same for state_dict(module).
TransferStats pack_to_file(Engine& engine, const ::torch::nn::Module& module, const std::filesystem::path& path,
                           const PackOptions& options = {});

struct ReadOptions {
  std::optional<NameFilter> only;  ///< When set, tensors that it does not match are not read.
  NameFilter ignore;               ///< Tensors that it matches are not read.
  CachePolicy cache = CachePolicy::kAuto;
  Verify verify = Verify::kAuto;
};

struct LoadedTensors {
  StateDict tensors;  ///< File by file, and in file order in each.
  TransferStats stats;
};

/// Reads the tensors of a checkpoint into new memory on the engine's device, several files at once. `path` is what
/// open_checkpoint() takes: a flashpack or safetensors file, an index, or a directory. Throws: Error; kCorrupt names
/// the tensors in the first stripe that does not match its checksum.
///
/// Each tensor behaves like one that torch made: it may be written, resized, and saved alone. Memory is allocated in
/// segments of at most 1 GiB, or of one larger tensor, and is freed with the last tensor of its segment. On the CPU
/// each tensor has its own storage, and up to 1 MiB between wanted tensors is read, too. On a CUDA device several
/// tensors share a storage, which is allocated on the calling thread's current stream; the load waits for that stream's
/// work. When this returns, any stream may use the tensors.
LoadedTensors read_tensors(Engine& engine, const std::filesystem::path& path, const ReadOptions& options = {});

struct AssignOptions {
  /// A parameter that the file lacks is an error. With this or strict_buffers, so is a name that the module lacks.
  bool strict_params = true;
  bool strict_buffers = false;  ///< A buffer that the file lacks is an error.
  /// Tensors of these names are left alone: they are not assigned, and are neither missing nor unexpected.
  NameFilter ignore;
  /// If true, loaded tensors are cast to the module's dtypes; a cast from or to integers that would change a value is
  /// an error. If false, parameters take the file's dtype, and a buffer whose dtype differs is an error.
  bool coerce_dtype = false;
  CachePolicy cache = CachePolicy::kAuto;
  Verify verify = Verify::kAuto;
};

/// Names of what assign_from_file() did. A tied tensor counts once, under the first of its names.
struct AssignReport {
  std::vector<std::string> assigned;
  std::vector<std::string> missing_parameters;  ///< Parameters that the file lacks; unchanged.
  std::vector<std::string> missing_buffers;
  std::vector<std::string> unexpected;  ///< Tensors that the module lacks; not read.
  TransferStats stats;
};

/// Loads a checkpoint, which is anything that open_checkpoint() takes, into `module`. After an error the module is
/// unchanged. A tensor that is assigned is on the engine's device afterwards; before the call it may be there or on the
/// CPU. A tensor that the file lacks stays where it is.
///
/// Only parameters and buffers are saved and loaded. If a module overrides save() and load(), those are not called.
///
/// Names, shapes and dtypes are checked against the metadata of all files before any payload is read. One load then
/// brings the payload into new memory, and every tensor gets its data as by `tensor.set_data(...)`. The module's
/// tensors stay the same objects, so that ties, optimizers, hooks and `requires_grad` stay valid; a gradient stays,
/// too, unless the dtype or the device changes. Tensors that are tied in the module are read once, from the first of
/// their names that the file has. Throws: Error; kMismatch when file and module do not fit, naming the tensor; kCorrupt
/// as read_tensors().
AssignReport assign_from_file(Engine& engine, ::torch::nn::Module& module, const std::filesystem::path& path,
                              const AssignOptions& options = {});

}  // namespace flashpack
