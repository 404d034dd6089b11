// The steps of one chunk. The loop that issues chunks is in pipeline.cc.
#include <cassert>
#include <cerrno>
#include <utility>

#include "engine/ground/error.h"
#include "engine/pipeline.h"

namespace flashpack::internal {

namespace {

// After this many results in a row without progress (EINTR, EAGAIN, less than a block) the transfer fails.
constexpr unsigned kMaxStalls = 32;

}  // namespace

void Pipeline::advance(unsigned tag) {
  Job& job = jobs_[tag];
  assert(job.next < job.way.steps.size());
  begin(tag, job.way.steps[job.next++]);
}

void Pipeline::begin(unsigned tag, Step step) {
  Job& job = jobs_[tag];
  jobs_.enter(job, step, now_);
  switch (step) {
    case Step::kRead:
    case Step::kWrite:
      return move_direct(tag);
    case Step::kReadIfCached:
    case Step::kReadCached:
    case Step::kWriteCached:
      ++job.transfer().stats.operations;
      [[fallthrough]];
    case Step::kPopulate:
    case Step::kCount:
      return give_to_workers(tag);
    case Step::kWait:
      return job.transfer().gate ? void() : advance(tag);
    case Step::kScatter:
    case Step::kGather:
      if (!job.way.to_device) return give_to_workers(tag);
      return copier_->push(tag, static_cast<unsigned>(job.slot), job.byte_work());
    case Step::kDeliver:
      return deliver(tag);
    case Step::kFree:
    case Step::kAbandoned:
      break;
  }
  assert(false && "a step of no way");
}

void Pipeline::move_direct(unsigned tag) {
  Job& job = jobs_[tag];
  DiskQueue*& queue = job.part->open->queue;
  if (queue->refuses()) queue = &queues_.stand_in;
  job.queue = queue;
  ++job.transfer().stats.operations;
  queue->push(tag, job.disk_request());
}

void Pipeline::give_to_workers(unsigned tag) {
  Job& job = jobs_[tag];
  job.queue = &queues_.workers;
  queues_.workers.push(tag, job.byte_work());
}

void Pipeline::complete(IoCompletion completion) {
  const auto [tag, result] = completion;
  switch (jobs_[tag].step) {
    case Step::kRead:
    case Step::kWrite:
      return on_direct(tag, result);
    case Step::kReadIfCached:
    case Step::kReadCached:
    case Step::kWriteCached:
      return on_buffered(tag, result);
    case Step::kPopulate:  // It may count, too, and bytes that have not been counted are an error.
    case Step::kScatter:
    case Step::kGather:
    case Step::kCount:
      return on_worked(tag, result < 0 ? errno_code(static_cast<int>(-result)) : std::error_code());
    case Step::kAbandoned:
      return close_job(tag);
    case Step::kWait:
    case Step::kDeliver:
    case Step::kFree:
      break;
  }
  assert(false && "completion of a job that has nothing under way");
}

void Pipeline::on_direct(unsigned tag, std::int64_t result) {
  Job& job = jobs_[tag];
  TransferStats& stats = job.transfer().stats;
  const bool reads = job.step == Step::kRead;
  if (result == -EINVAL || result == -EOPNOTSUPP) return refuse_direct(tag);
  const bool interrupted = result == -EINTR || result == -EAGAIN;
  if (result < 0 && !interrupted) return fail(tag, errno_code(static_cast<int>(-result)));

  const std::uint64_t got = job.done_bytes + (interrupted ? 0 : static_cast<std::uint64_t>(result));
  stats.direct_bytes += got - job.done_bytes;
  if (job.file_bytes.offset_bytes + got >= end_of(*job.chunk)) {
    if (has_slot(job.way.view)) stats.staged_bytes += got;
    return advance(tag);
  }
  if (result == 0 && reads) return fail(tag, Errc::kTruncated);
  // Direct I/O can go on only at a whole block. Less than a block is no progress and is tried again a bounded number of
  // times.
  const std::uint64_t resume = round_down(got, job.part->file().alignment().block_bytes);
  job.stalls = resume > job.done_bytes ? 0 : job.stalls + 1;
  if (job.stalls > kMaxStalls) {
    const std::error_code no_progress = reads ? make_error_code(Errc::kTruncated) : errno_code(EIO);
    return fail(tag, interrupted ? errno_code(static_cast<int>(-result)) : no_progress);
  }
  job.done_bytes = resume;
  ++stats.retries;
  begin(tag, job.step);
}

void Pipeline::on_buffered(unsigned tag, std::int64_t result) {
  const Job& job = jobs_[tag];
  if (job.step == Step::kReadIfCached && result == -EAGAIN) return give_back(tag);
  if (result < 0) return fail(tag, errno_code(static_cast<int>(-result)));
  TransferState& transfer = job.transfer();
  const auto moved = static_cast<std::uint64_t>(result);
  transfer.stats.buffered_bytes += moved;
  const bool in_slot = has_slot(job.way.view);
  if (moved != (in_slot ? job.file_bytes.size_bytes : job.part->plan.wanted_bytes(*job.chunk)))
    return fail(tag, job.step == Step::kWriteCached ? errno_code(EIO) : make_error_code(Errc::kTruncated));
  if (in_slot) transfer.stats.staged_bytes += moved;
  advance(tag);
}

// To be called when a copy or a count has ended.
void Pipeline::on_worked(unsigned tag, std::error_code error) {
  if (jobs_[tag].transfer().failure) return close_job(tag);
  error ? fail(tag, error) : advance(tag);
}

// Some file systems accept O_DIRECT at open and refuse it at the first read or write. The chunk then goes another way,
// which may not need its slot.
void Pipeline::refuse_direct(unsigned tag) {
  Job& job = jobs_[tag];
  TransferState& transfer = job.transfer();
  assert(job.step == Step::kRead || job.step == Step::kWrite);
  job.part->router.refuse_direct();
  ++transfer.stats.retries;
  transfer.note_fallback("direct I/O: refused by the file system at the first use");
  jobs_.reroute(job, way_of(*job.part, *job.chunk, Route::kRefused));
  advance(tag);
}

// To be called when a chunk was not cached, against the router's answer. It is read past the page cache instead.
void Pipeline::give_back(unsigned tag) {
  const Job& job = jobs_[tag];
  Part& part = *job.part;
  assert(part.state == Part::State::kOpen && part.chunks_open > 0);
  part.router.give_back(*job.chunk);
  ++part.transfer->stats.retries;
  issue_from_now_on(part);
  close_job(tag);
}

void Pipeline::deliver(unsigned tag) {
  const Job& job = jobs_[tag];
  Part& part = *job.part;
  const Chunk& chunk = *job.chunk;
  assert(part.chunks_open > 0);
  part.transfer->done_bytes += part.plan.wanted_bytes(chunk);
  --part.chunks_open;
  close_job(tag);
  try {
    part.transfer->report_landed(part, chunk);
  } catch (const Error& error) {
    return give_up(*part.transfer, error);
  }
  if (part.chunks_open == 0 && part.state == Part::State::kOpen) on_delivered(part);
}

void Pipeline::fail(unsigned tag, std::error_code code) {
  const Job& job = jobs_[tag];
  TransferState& transfer = job.transfer();
  const Error error =
      range_error(code, transfer.verb(), job.part->path, job.chunk->offset_bytes, job.chunk->size_bytes);
  close_job(tag);
  give_up(transfer, error);
}

// Cancels the transfer's operations in flight. Copies are left to end by themselves, and a job that waits for a gate
// has no operation.
void Pipeline::abandon_jobs_of(TransferState& transfer) {
  if (transfer.jobs == 0) return;
  for (unsigned tag = 0; tag < jobs_.size(); ++tag) {
    Job& job = jobs_[tag];
    const bool copies = job.step == Step::kScatter || job.step == Step::kGather;
    if (!job.part || job.part->transfer != &transfer || copies || job.step == Step::kWait) continue;
    assert(job.queue && job.step != Step::kDeliver);
    job.queue->cancel(tag);
    jobs_.enter(job, Step::kAbandoned, now_);
  }
}

void Pipeline::close_job(unsigned tag) {
  TransferState& transfer = jobs_[tag].transfer();
  jobs_.close(tag);
  if (transfer.failure) settle(transfer);
}

}  // namespace flashpack::internal
