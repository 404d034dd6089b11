// What one chunk goes through, step by step; the loop that leads there is in pipeline.cc.
#include <cassert>
#include <cerrno>
#include <utility>

#include "engine/error.h"
#include "engine/pipeline.h"

namespace flashpack::engine {

namespace {

// Results in a row that bring nothing (EINTR, EAGAIN, less than a block) before it is an error.
constexpr unsigned kMaxStalls = 32;

}  // namespace

void Pipeline::move_direct(unsigned tag) {
  Job& job = jobs_[tag];
  enter(job, Stage::kDirect);
  ++job.transfer->stats.operations;
  const File& file = job.transfer->file(job.chunk->file);
  disk_.push(tag, {.op = job.transfer->is_load() ? IoRequest::Op::kRead : IoRequest::Op::kWrite,
                   .fd = file.direct_fd(),
                   .offset_bytes = job.offset_bytes + job.done_bytes,
                   .memory = job.memory.subspan(job.done_bytes),
                   .may_block = file.may_block(),
                   .slot = job.slot});
}

void Pipeline::move_buffered(unsigned tag) {
  Job& job = jobs_[tag];
  TransferState& transfer = *job.transfer;
  const bool load = transfer.is_load();
  enter(job, Stage::kBuffered);
  job.only_cached = transfer.router.on_suspicion(*job.chunk);
  auto pieces = transfer.plan.pieces_of(*job.chunk);
  if (job.slot >= 0) {
    job.whole = {job.offset_bytes, job.memory.size(), job.memory.data()};
    pieces = {&job.whole, 1};
  }
  ++transfer.stats.operations;
  workers_.push(tag, {.op = load ? IoRequest::Op::kReadPieces : IoRequest::Op::kWritePieces,
                      .fd = transfer.file(job.chunk->file).buffered_fd(),
                      .pieces = pieces,
                      .page_cache = {.only = job.only_cached, .drop = transfer.after == AfterLoad::kDrop},
                      .sums = take_sums(job)});
}

// Each byte is to be counted once: null when they have been.
PieceSums* Pipeline::take_sums(Job& job) {
  return std::exchange(job.counted, true) ? nullptr : job.transfer->sums(job.chunk->file);
}

void Pipeline::count_bytes(unsigned tag, PieceSums* sums) {
  const Job& job = jobs_[tag];
  enter(jobs_[tag], Stage::kCounting);
  workers_.push(tag, {.op = IoRequest::Op::kChecksum,
                      .offset_bytes = job.offset_bytes,
                      .memory = job.memory,
                      .pieces = job.transfer->plan.pieces_of(*job.chunk),
                      .readable = true,
                      .sums = sums});
}

// Between the slot and where the pieces are.
void Pipeline::copy(unsigned tag) {
  Job& job = jobs_[tag];
  TransferState& transfer = *job.transfer;
  const bool load = transfer.is_load();
  if (load && job.chunk->on_device) {
    if (PieceSums* const sums = take_sums(job)) return count_bytes(tag, sums);
  }
  if (job.chunk->on_device && transfer.gate) return enter(job, Stage::kWaiting);
  enter(job, load ? Stage::kCopying : Stage::kGathering);
  const IoRequest request{.op = load ? IoRequest::Op::kScatter : IoRequest::Op::kGather,
                          .offset_bytes = job.offset_bytes,
                          .memory = job.memory,
                          .pieces = transfer.plan.pieces_of(*job.chunk),
                          .sums = job.chunk->on_device ? nullptr : take_sums(job),
                          .slot = job.slot};
  job.chunk->on_device ? copier_->push(tag, request) : workers_.push(tag, request);
}

void Pipeline::complete(IoCompletion completion) {
  const auto [tag, result] = completion;
  switch (jobs_[tag].stage) {
    case Stage::kPopulating:
      return move_direct(tag);
    case Stage::kDirect:
      return on_direct(tag, result);
    case Stage::kCopying:
    case Stage::kGathering:
      return on_copied(tag, result < 0 ? errno_code(static_cast<int>(-result)) : std::error_code());
    case Stage::kCounting:
      return result < 0 ? fail(tag, errno_code(static_cast<int>(-result))) : on_counted(tag);
    case Stage::kBuffered:
      return on_buffered(tag, result);
    case Stage::kAbandoned:
      return close_job(tag);
    case Stage::kWaiting:
    case Stage::kFree:
      break;
  }
  assert(false && "completion of a job that is not under way");
}

void Pipeline::on_direct(unsigned tag, std::int64_t result) {
  Job& job = jobs_[tag];
  TransferStats& stats = job.transfer->stats;
  const bool load = job.transfer->is_load();
  if (result == -EINVAL || result == -EOPNOTSUPP) return refuse_direct(tag);
  const bool interrupted = result == -EINTR || result == -EAGAIN;
  if (result < 0 && !interrupted) return fail(tag, errno_code(static_cast<int>(-result)));

  const std::uint64_t got = job.done_bytes + (interrupted ? 0 : static_cast<std::uint64_t>(result));
  stats.direct_bytes += got - job.done_bytes;
  if (job.offset_bytes + got >= job.chunk->offset_bytes + job.chunk->size_bytes) {
    if (job.slot >= 0) stats.staged_bytes += got;
    if (job.slot >= 0 && load) return copy(tag);
    PieceSums* const sums = load ? take_sums(job) : nullptr;
    return sums ? count_bytes(tag, sums) : deliver(tag);
  }
  if (result == 0 && load) return fail(tag, Errc::kTruncated);
  // Direct I/O goes on at whole blocks only. Less than a block is no progress; it is tried again, but not for ever.
  const std::uint64_t resume = round_down(got, job.transfer->file(job.chunk->file).alignment().block_bytes);
  job.stalls = resume > job.done_bytes ? 0 : job.stalls + 1;
  if (job.stalls > kMaxStalls) {
    const std::error_code stuck = load ? make_error_code(Errc::kTruncated) : errno_code(EIO);
    return fail(tag, interrupted ? errno_code(static_cast<int>(-result)) : stuck);
  }
  job.done_bytes = resume;
  ++stats.retries;
  move_direct(tag);
}

void Pipeline::on_buffered(unsigned tag, std::int64_t result) {
  const Job& job = jobs_[tag];
  if (job.only_cached && result == -EAGAIN) return give_back(tag);
  if (result < 0) return fail(tag, errno_code(static_cast<int>(-result)));
  TransferState& transfer = *job.transfer;
  const auto moved = static_cast<std::uint64_t>(result);
  transfer.stats.buffered_bytes += moved;
  if (moved != (job.slot >= 0 ? job.memory.size() : transfer.plan.wanted_bytes(*job.chunk))) {
    return fail(tag, transfer.is_load() ? make_error_code(Errc::kTruncated) : errno_code(EIO));
  }
  if (job.slot >= 0) transfer.stats.staged_bytes += moved;
  job.slot >= 0 && transfer.is_load() ? copy(tag) : deliver(tag);
}

void Pipeline::on_copied(unsigned tag, std::error_code error) {
  const TransferState& transfer = *jobs_[tag].transfer;
  if (transfer.failure) return close_job(tag);
  if (error) return fail(tag, error);
  transfer.is_load() ? deliver(tag) : write_slot(tag);
}

void Pipeline::write_slot(unsigned tag) {
  Job& job = jobs_[tag];
  if (job.to_cache) return move_buffered(tag);
  PieceSums* const sums = take_sums(job);
  sums ? count_bytes(tag, sums) : move_direct(tag);
}

void Pipeline::on_counted(unsigned tag) {
  const Job& job = jobs_[tag];
  if (!job.transfer->is_load()) return move_direct(tag);
  job.slot >= 0 ? copy(tag) : deliver(tag);
}

// Some file systems take O_DIRECT at open and refuse it at the first read or write.
void Pipeline::refuse_direct(unsigned tag) {
  Job& job = jobs_[tag];
  job.transfer->direct(job.chunk->file) = false;
  ++job.transfer->stats.retries;
  job.transfer->note_fallback("direct I/O: refused by the file system at the first use");
  if (!job.transfer->is_load()) return move_buffered(tag);
  if (job.chunk->on_device) {
    job.offset_bytes = job.chunk->offset_bytes;
    job.memory = slot_memory(job).first(job.chunk->size_bytes);
  } else if (job.slot >= 0) {
    free_slots_.push_back(std::exchange(job.slot, -1));
  }
  move_buffered(tag);
}

// It was not in the page cache after all.
void Pipeline::give_back(unsigned tag) {
  const Job& job = jobs_[tag];
  TransferState& transfer = *job.transfer;
  transfer.sources[job.chunk->file].residency.report_wrong();
  transfer.router.give_back(*job.chunk);
  ++transfer.stats.retries;
  close_job(tag);
}

void Pipeline::deliver(unsigned tag) {
  const Job& job = jobs_[tag];
  job.transfer->done_bytes += job.transfer->plan.wanted_bytes(*job.chunk);
  --job.transfer->chunks_open;
  close_job(tag);
}

void Pipeline::fail(unsigned tag, std::error_code code) {
  const Job& job = jobs_[tag];
  TransferState& transfer = *job.transfer;
  give_up(transfer, range_error(code, transfer.verb(), transfer.path_of(job.chunk->file), job.chunk->offset_bytes,
                                job.chunk->size_bytes));
  close_job(tag);
}

// From here on nothing is issued for it; what is under way is asked to end, and waited for. Copies end by
// themselves, and who waits has nothing under way.
void Pipeline::give_up(TransferState& transfer, const Error& error) {
  transfer.failure = Failure(error);
  for (unsigned tag = 0; tag < jobs_.size(); ++tag) {
    Job& job = jobs_[tag];
    const bool copies = job.stage == Stage::kCopying || job.stage == Stage::kGathering;
    if (job.transfer != &transfer || copies || job.stage == Stage::kWaiting) continue;
    (job.stage == Stage::kDirect ? disk_ : workers_).cancel(tag);
    enter(job, Stage::kAbandoned);
  }
}

void Pipeline::close_job(unsigned tag) {
  Job& job = jobs_[tag];
  TransferState& transfer = *job.transfer;
  if (job.slot >= 0) free_slots_.push_back(job.slot);
  enter(job, Stage::kFree);
  job = Job{};
  free_jobs_.push_back(tag);
  if (--transfer.outstanding == 0 && (transfer.failure || transfer.chunks_open == 0)) end(transfer);
}

}  // namespace flashpack::engine
