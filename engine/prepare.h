/// Turns a request into a transfer that can be started. All errors in the arguments are found here. Any thread may call
/// these functions.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "engine/copier.h"
#include "engine/transfer_state.h"
#include "flashpack/engine.h"

namespace flashpack::internal {

/// Facts about an engine that all of its transfers need.
struct EngineFacts {
  std::uint64_t number = 0;  ///< Engines of a process are numbered from 1 on.
  std::uint32_t chunk_bytes = 0;
  std::uint32_t at_once_bytes = 0;  ///< See read_at_once().
  Backend backend = Backend::kAuto;
  DiskQueue* disk = nullptr;          ///< Serves files that are written.
  Copier* copier = nullptr;           ///< Null for an engine of the host.
  PagePolicy* page_policy = nullptr;  ///< Belongs to the engine's memory pool.
  std::string fallback_reason;        ///< Why memory is not as asked for, which every transfer reports; empty if it is.
};

/// Prepares a load. Its files are opened and planned later, when their turn comes, except those that are open already.
/// Throws: Error. If a part has failed already, or all of it has been read, its handover has the result.
std::shared_ptr<TransferState> prepare_load(const EngineFacts& engine, LoadRequest request, Completion* completion);

/// Returns the extents of a write in ascending order of offset. `path` is for messages. Throws: Error.
std::vector<Fragment> extents_of(const EngineFacts& engine, const WriteRequest& request,
                                 const std::filesystem::path& path);

/// The file that a store writes to.
struct StoreTarget {
  std::filesystem::path path;  ///< For messages.
  FileUse open;
  bool checksums = false;  ///< Whether the bytes are counted.
};

/// Prepares and plans a store of the extents that extents_of() returned, which must not overlap. Throws: Error.
std::shared_ptr<TransferState> prepare_store(const EngineFacts& engine, const StoreTarget& target,
                                             const WriteRequest& request, std::vector<Fragment> extents,
                                             Completion* completion);

}  // namespace flashpack::internal
