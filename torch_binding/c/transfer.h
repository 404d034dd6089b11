/// Functions that all ways to start and wait for a transfer share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "torch_binding/c/handles.h"

namespace flashpack::c {

/// The deadline of a request that has so many nanoseconds from now on; empty for 0. Throws: Error (kInvalidArgument) if
/// the number is negative.
std::optional<Deadline> deadline_in(std::int64_t timeout_ns);

/// The streams of a request for the further devices of its engine. Throws: Error (kInvalidArgument) if `more_streams`
/// is null and there are some.
std::vector<CUstream_st*> streams_in(void* const* more_streams, std::size_t count);

/// Waits until the transfer has finished. Throws: the Error that it ended with. Any thread.
void wait(flashpack_transfer& transfer);

}  // namespace flashpack::c
