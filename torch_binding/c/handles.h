/// The types behind the handles of the C API, and what each owns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "flashpack/checkpoint.h"
#include "flashpack/engine.h"
#include "flashpack/file_handle.h"
#include "flashpack/flashpack.h"
#include "flashpack/host_memory.h"

namespace flashpack::c {

/// A checkpoint that is open, and what is asked about it.
struct OpenCheckpoint {
  explicit OpenCheckpoint(Checkpoint opened);

  Checkpoint checkpoint;
  std::map<std::string, std::string> metadata;
  std::vector<const std::pair<const std::string, std::string>*> metadata_by_index;
  // By name. The names are those of a file, whose writer might have chosen them for their hashes.
  std::map<std::string_view, std::size_t> index_of;
};

using Memory = std::vector<HostMemory>;

}  // namespace flashpack::c

struct flashpack_engine {
  std::shared_ptr<flashpack::Engine> engine;  // Shared with the writers, because these need it until they end.
};

struct flashpack_checkpoint {
  // Shared with the loads, so that the caller may destroy the handle earlier.
  std::shared_ptr<const flashpack::c::OpenCheckpoint> opened;
};

struct flashpack_open_file {
  flashpack::FileHandle file;
};

struct flashpack_memory {
  flashpack::HostMemory memory;
};

struct flashpack_tensors {
  std::shared_ptr<const flashpack::c::Memory> memory;  // Shared with the transfer, because either may go first.
  std::vector<void*> data;                             // For each tensor of the checkpoint.
};

struct flashpack_transfer {
  // Shared with the checkpoint's handle, which may go first. Null unless extents are of a checkpoint.
  std::shared_ptr<const flashpack::c::OpenCheckpoint> opened;
  flashpack::Verify verify = flashpack::Verify::kNever;
  // The targets, unless they are the caller's. Shared with the tensors.
  std::shared_ptr<const flashpack::c::Memory> memory;
  std::size_t file_count = 0;      // Of a load that continues on errors, else 0.
  std::vector<std::size_t> files;  // For each file of its LoadRequest, the index among those, which ascends.
  flashpack::Transfer transfer;    // After `memory`, because it ends before that goes.

  std::mutex mutex;  // Protects the rest, and calls that are for one thread at a time.
  // Both are set when they are first asked for after the end.
  std::optional<flashpack::TransferStats> stats;
  std::optional<std::vector<flashpack::FileError>> file_errors;  // Sorted by file.
};

struct flashpack_writer {
  std::shared_ptr<flashpack::Engine> engine;  // Shared with the engine's handle, which may go first.
  flashpack::FileWriter writer;               // After `engine`, because it ends before.
};
