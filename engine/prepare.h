/// From a request to a transfer that can be started. All that is wrong with the arguments is found here.
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

/// What all transfers of an engine have in common.
struct EngineFacts {
  std::uint32_t chunk_bytes = 0;
  Backend backend = Backend::kAuto;
  Copier* copier = nullptr;     ///< Null for an engine of the host.
  std::string fallback_reason;  ///< Why its memory is not as asked for, which every transfer is to say; or empty.
};

/// A load, whose files are opened and planned when their turn comes.
/// Throws: Error. What start_load() leaves to the transfer to report is in its `failure`.
std::shared_ptr<TransferState> prepare_load(const EngineFacts& engine, LoadRequest request, Completion* completion);

/// The extents of a write to the file that messages call `path`, in ascending order of offset. Throws: Error.
std::vector<Fragment> extents_of(const EngineFacts& engine, const WriteRequest& request,
                                 const std::filesystem::path& path);

/// Where a store goes.
struct StoreTarget {
  std::filesystem::path path;  ///< For messages.
  std::shared_ptr<OpenFile> open;
  bool checksums = false;  ///< Its bytes are counted.
};

/// A store of what extents_of(`request`) has given, without overlaps; it is planned. Throws: Error.
std::shared_ptr<TransferState> prepare_store(const EngineFacts& engine, const StoreTarget& target,
                                             const WriteRequest& request, std::vector<Fragment> extents,
                                             Completion* completion);

}  // namespace flashpack::internal
