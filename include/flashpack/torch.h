/// flashpack files and LibTorch: tensors and modules, packed and loaded.
///
///   flashpack::Engine engine;
///   flashpack::pack_to_file(engine, *model, "model.flashpack");
///   flashpack::assign_from_file(engine, *model, "model.flashpack");
///
/// Everything here blocks, and throws Error; what torch itself refuses (memory, mostly) is a c10::Error. Whatever is
/// thrown, the module and the file at the destination are what they were, unless the error says otherwise.
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
#include "flashpack/name_filter.h"

namespace torch::nn {
class Module;
}

namespace flashpack {

/// Tensors by name, in order. Names are unique.
using StateDict = std::vector<std::pair<std::string, at::Tensor>>;

/// The module's parameters and buffers in the order of Python's state_dict(): a module's own parameters, its own
/// buffers, then its children. A tied tensor stands under each of its names. The tensors are the module's, not copies.
StateDict state_dict(const ::torch::nn::Module& module);

struct PackOptions {
  /// Floating-point tensors are cast to this, or complex ones; empty leaves each its own. Integers and 8-bit floats,
  /// which may be packed or quantised weights, keep theirs, and a cast to integers is an error.
  std::optional<at::ScalarType> target_dtype;
  /// Order of the tensors in the file; tensors it does not list are left out. Empty: largest first.
  std::optional<std::vector<std::string>> name_order;
  std::uint64_t align_bytes = 128;  ///< Each tensor begins at a multiple of it; 0 packs densely.
  /// Puts checksums of the payload into the footer; readers that do not know them pass them over. Without them the file
  /// is, byte for byte, what the Python reference writes.
  bool checksum = true;
  /// UTF-8; goes into the footer, as Metadata::user_metadata.
  std::map<std::string, std::string> metadata;
};

/// Writes `tensors` to a new file that replaces `path` when it is complete and durable. The directory must exist.
///
/// Tensors may be on any device and in any strided form; the file holds them contiguous and row-major. What has to be
/// converted first is converted in parts, with at most 64 MiB of copies alive. What lies on the engine's own CUDA
/// device is copied from there as it is written. They must not change meanwhile. Throws: Error (kInvalidArgument)
/// naming the tensor when one is undefined, sparse, meta, or of a dtype that the format does not have; make_layout()'s
/// and FileWriter's errors.
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
  StateDict tensors;  ///< In file order.
  TransferStats stats;
};

/// Reads a file's tensors into new memory on the engine's device. Throws: Error; kCorrupt names the tensors in the
/// first stripe that does not match its checksum.
///
/// Each tensor behaves like one that torch made: it may be written, resized, and saved alone. Memory comes in segments
/// of at most 1 GiB (or one tensor) and goes back when the last tensor of its segment dies. What lies between wanted
/// tensors is read along when it is shorter than 1 MiB. On the CPU each tensor has a storage of its own; on a CUDA
/// device those from 1 MiB on share their segment's. There, memory is allocated and the load ordered on the calling
/// thread's current stream; when this returns, any stream may use the tensors.
LoadedTensors read_tensors(Engine& engine, const std::filesystem::path& path, const ReadOptions& options = {});

struct AssignOptions {
  /// A parameter that the file lacks is an error. This or strict_buffers: a name that the module lacks is one, too.
  bool strict_params = true;
  bool strict_buffers = false;  ///< A buffer that the file lacks is an error.
  /// Names that are neither assigned nor missed nor unexpected.
  NameFilter ignore;
  /// Casts what is loaded to the module's dtypes, and where a cast from or to integers would change a value, that is an
  /// error. Otherwise parameters take the file's dtype, and a buffer whose dtype differs is an error.
  bool coerce_dtype = false;
  CachePolicy cache = CachePolicy::kAuto;
  Verify verify = Verify::kAuto;
};

/// What assign_from_file() did, by name. A tied tensor counts once, under the first of its names.
struct AssignReport {
  std::vector<std::string> assigned;
  std::vector<std::string> missing_parameters;  ///< In the module but not in the file; unchanged.
  std::vector<std::string> missing_buffers;
  std::vector<std::string> unexpected;  ///< In the file but not in the module; not read.
  TransferStats stats;
};

/// Loads a file into `module`, all or nothing. What is assigned ends on the engine's device; before, it may be there or
/// on the CPU. What the file lacks stays where it is.
///
/// Parameters and buffers are what is saved and loaded: save() and load() that a module overrides are not called.
///
/// Names, shapes and dtypes are checked from the footer before any payload is read; then one load into new memory; then
/// every tensor changes its data as by `tensor.set_data(...)`. The module's tensors stay the same objects, so ties,
/// optimizers, hooks and `requires_grad` stay too, and so does a gradient unless the dtype changes. Tensors tied in the
/// module are read once, from the first of their names that the file has.
/// Throws: Error; kMismatch when file and module do not fit, naming the tensor; kCorrupt as read_tensors().
AssignReport assign_from_file(Engine& engine, ::torch::nn::Module& module, const std::filesystem::path& path,
                              const AssignOptions& options = {});

}  // namespace flashpack
