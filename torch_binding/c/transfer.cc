#include "torch_binding/c/transfer.h"

#include <algorithm>
#include <chrono>

#include "torch_binding/c/arguments.h"
#include "torch_binding/c/errors.h"
#include "torch_binding/format/verified.h"

namespace flashpack::c {

namespace {

// Sums of now and longer durations would overflow.
constexpr std::chrono::nanoseconds kLongest = std::chrono::hours(24 * 365);

std::chrono::nanoseconds duration_of(std::int64_t timeout_ns) {
  if (timeout_ns < 0) throw argument_error("timeout_ns is negative");
  return std::min(std::chrono::nanoseconds(timeout_ns), kLongest);
}

// Calls `result`, which returns how a load ended or throws its Error, which then names the tensors that it concerns.
template <typename Result>
void look_at(flashpack_transfer& transfer, Result result) {
  if (transfer.opened) {
    verified(transfer.opened->checkpoint, transfer.verify, result);
  } else {
    result();
  }
}

// Throws the Error that the transfer ended with. Requires: it has finished.
void throw_failure(flashpack_transfer& transfer) {
  const std::lock_guard lock(transfer.mutex);
  look_at(transfer, [&] { return transfer.transfer.wait(); });
}

// Throws the Error that one file of the caller's ended with. Requires: the transfer has finished.
void throw_failure(flashpack_transfer& transfer, std::size_t file) {
  const std::lock_guard lock(transfer.mutex);
  if (!transfer.file_errors) transfer.file_errors = transfer.transfer.file_errors();
  const auto callers_index = [&](const FileError& failed) { return transfer.files[failed.file]; };
  const auto found = std::ranges::lower_bound(*transfer.file_errors, file, {}, callers_index);
  if (found == transfer.file_errors->end() || callers_index(*found) != file) return;
  look_at(transfer, [&]() -> TransferStats { throw found->error; });
}

}  // namespace

std::vector<CUstream_st*> streams_in(void* const* more_streams, std::size_t count) {
  std::vector<CUstream_st*> streams;
  for (void* const stream : array(more_streams, count, "more_streams"))
    streams.push_back(static_cast<CUstream_st*>(stream));
  return streams;
}

std::optional<Deadline> deadline_in(std::int64_t timeout_ns) {
  if (timeout_ns == 0) return std::nullopt;
  return Deadline::clock::now() + duration_of(timeout_ns);
}

void wait(flashpack_transfer& transfer) {
  while (!transfer.transfer.wait_for(kLongest)) {
  }
  throw_failure(transfer);
}

}  // namespace flashpack::c

using namespace flashpack::c;

flashpack_status flashpack_transfer_wait(flashpack_transfer* transfer, flashpack_error** error) {
  return guarded(error, [&] { wait(require(transfer, "transfer")); });
}

flashpack_status flashpack_transfer_wait_for(flashpack_transfer* transfer, int64_t timeout_ns,
                                             flashpack_error** error) {
  return guarded(error, [&]() -> flashpack_status {
    flashpack_transfer& asked = require(transfer, "transfer");
    if (!asked.transfer.wait_for(duration_of(timeout_ns))) return FLASHPACK_RUNNING;
    throw_failure(asked);
    return FLASHPACK_OK;
  });
}

flashpack_status flashpack_transfer_file_status(flashpack_transfer* transfer, size_t file, flashpack_error** error) {
  return guarded(error, [&]() -> flashpack_status {
    flashpack_transfer& asked = require(transfer, "transfer");
    if (asked.file_count == 0) throw argument_error("the load was not started with continue_on_error");
    if (file >= asked.file_count) {
      throw argument_error("there is no file " + std::to_string(file) + " of " + std::to_string(asked.file_count));
    }
    if (!asked.transfer.progress().finished) return FLASHPACK_RUNNING;
    throw_failure(asked, file);
    return FLASHPACK_OK;
  });
}

flashpack_status flashpack_transfer_cancel(flashpack_transfer* transfer, flashpack_error** error) {
  return guarded(error, [&] {
    flashpack_transfer& asked = require(transfer, "transfer");
    asked.transfer.progress();  // It tells, unlike cancel(), whether the transfer is the parent's.
    asked.transfer.cancel();
  });
}

flashpack_status flashpack_transfer_get_progress(flashpack_transfer* transfer, flashpack_progress* progress,
                                                 flashpack_error** error) {
  return guarded(error, [&] {
    const flashpack::Progress now = require(transfer, "transfer").transfer.progress();
    give(flashpack_progress{.done_bytes = now.done_bytes,
                            .total_bytes = now.total_bytes,
                            .outstanding = now.outstanding,
                            .finished = now.finished},
         progress, "progress");
  });
}

flashpack_status flashpack_transfer_get_stats(flashpack_transfer* transfer, flashpack_stats* stats,
                                              flashpack_error** error) {
  return guarded(error, [&]() -> flashpack_status {
    flashpack_transfer& asked = require(transfer, "transfer");
    if (!asked.transfer.progress().finished) return FLASHPACK_RUNNING;
    const std::lock_guard lock(asked.mutex);
    if (!asked.stats) asked.stats = asked.transfer.stats();
    give(flashpack_stats{.requested_bytes = asked.stats->requested_bytes,
                         .direct_bytes = asked.stats->direct_bytes,
                         .buffered_bytes = asked.stats->buffered_bytes,
                         .staged_bytes = asked.stats->staged_bytes,
                         .operations = asked.stats->operations,
                         .retries = asked.stats->retries,
                         .verified_bytes = asked.stats->verified_bytes,
                         .seconds = asked.stats->seconds,
                         .backend = static_cast<int32_t>(asked.stats->backend),
                         .pinned = asked.stats->pinned,
                         .fallback_reason = asked.stats->fallback_reason.c_str()},
         stats, "stats");
    return FLASHPACK_OK;
  });
}

void flashpack_transfer_destroy(flashpack_transfer* transfer) { delete transfer; }
