/// Opens the file of a part and plans its chunks.
///
/// Thread safety: any thread may call the functions, each for a part of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <system_error>

#include "engine/part.h"

namespace flashpack::internal {

/// How the files of a pipeline are opened.
struct OpenRules {
  std::uint32_t chunk_bytes = 0;
  std::uint32_t at_once_bytes = 0;  // See read_at_once().
};

/// Reads a load of at most `at_once_bytes` from the page cache, without waiting for the disk, if all of it is there.
/// This costs less than to hand chunks from thread to thread. Returns nothing if the load must be done by chunks, or if
/// the driver has claimed the memory; the targets may have been changed. Without `known` it may open the file once
/// more, which may block.
std::optional<PartResult> read_at_once(const PartRequest& request, const File& file, const Residency* known,
                                       Handover& handover, std::uint32_t at_once_bytes);

/// Whether read_at_once() may find all of the load in the page cache, of which `known` tells.
bool may_read_at_once(const PartRequest& request, const File& file, const Residency& known,
                      std::uint32_t at_once_bytes);

/// Plans the chunks of a load from `planned.open`, and sets the other members of `planned`. Throws: Error, kTruncated.
void plan_load(const PartRequest& request, std::uint32_t chunk_bytes, PlannedFile& planned);

/// The result of open_part(). With `planned` alone, the driver moves the chunks. With both, the file is open but cannot
/// be read, and the driver has it closed. With `failure` alone, the file is not open. With neither, the thread has read
/// all of it and closed it, and the handover has the result.
struct Opened {
  std::unique_ptr<PlannedFile> planned;
  std::optional<Failure> failure;
};

/// Opens the file of a load, from `given` if that is set, checks whether it is the expected one, and plans its chunks.
/// If `may_wait_for_descriptors`, a lack of descriptors is a failure also where the file could be read without direct
/// I/O. May block for ever.
Opened open_part(const PartRequest& request, UniqueFd given, Handover& handover, FileTable& files, OpenRules rules,
                 bool may_wait_for_descriptors = false) noexcept;

/// Whether the process or the system has no descriptors left.
bool no_descriptors(std::error_code error);

}  // namespace flashpack::internal
