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

void Pipeline::enter(Job& job, Step step) {
  if (job.stuck) clear_stuck(job);
  assert(jobs_in(job.step) > 0);
  --jobs_in(job.step);
  ++jobs_in(job.step = step);
  job.since = now_;
}

void Pipeline::set_stuck(Job& job) {
  assert(!job.stuck && may_be_late(job.step) && jobs_in(job.step) > 0);
  job.stuck = true;
  --jobs_in(job.step);
  ++job.part->open->stuck;
  ++job.part->file_system->stuck;
  ++stuck_jobs_;
  if (job.slot >= 0) ++stuck_slots_;
}

void Pipeline::clear_stuck(Job& job) {
  FileSystem& file_system = *job.part->file_system;
  assert(job.stuck && stuck_jobs_ > 0 && job.part->open->stuck > 0 && file_system.stuck > 0);
  job.stuck = false;
  ++jobs_in(job.step);
  --job.part->open->stuck;
  --file_system.stuck;
  --stuck_jobs_;
  if (job.slot >= 0) --stuck_slots_;
  if (!std::exchange(job.late, false)) return;
  assert(file_system.late > 0);
  if (--file_system.late > 0) return;
  held_up_parts_ -= file_system.loads;
  look_at_parked_ = true;
}

void Pipeline::set_late(Job& job) {
  if (!job.stuck) set_stuck(job);
  job.late = true;
  read_mounts();
  FileSystem& file_system = *job.part->file_system;
  if (file_system.late++ == 0) held_up_parts_ += file_system.loads;
}

unsigned Pipeline::open_job(Part& part, const Chunk& chunk) {
  assert(!free_jobs_.empty() && part.open);
  const unsigned tag = free_jobs_.back();
  free_jobs_.pop_back();
  assert(jobs_[tag].step == Step::kFree);
  jobs_[tag] = Job{.part = &part, .chunk = &chunk};
  ++part.transfer->jobs;
  ++part.transfer->outstanding;
  return tag;
}

std::optional<unsigned> Pipeline::open_job_with_slot(Part& part, const Chunk& chunk) {
  // A chunk behind a gate may wait long, so such chunks leave half of the slots to others.
  const std::size_t kept = part.transfer->gate ? limits_.slots / 2 : 0;
  const std::size_t used = slots_.size() - free_slots_.size() - stuck_slots_;
  if (free_slots_.empty() || used + kept >= limits_.slots) return std::nullopt;
  const std::size_t spare = slots_.size() - limits_.slots;
  if (has_enough_stuck(part, stuck_slots_ + stuck_share(), spare, spare + limits_.slots / 2)) return std::nullopt;
  const unsigned tag = open_job(part, chunk);
  jobs_[tag].slot = free_slots_.back();
  free_slots_.pop_back();
  return tag;
}

void Pipeline::advance(unsigned tag) {
  Job& job = jobs_[tag];
  assert(job.next < job.way.steps.size());
  begin(tag, job.way.steps[job.next++]);
}

void Pipeline::begin(unsigned tag, Step step) {
  Job& job = jobs_[tag];
  enter(job, step);
  switch (step) {
    case Step::kPopulate:
      return populate(tag);
    case Step::kRead:
    case Step::kWrite:
      return move_direct(tag);
    case Step::kReadIfCached:
    case Step::kReadCached:
    case Step::kWriteCached:
      return move_buffered(tag);
    case Step::kWait:
      return job.transfer().gate ? void() : advance(tag);
    case Step::kScatter:
    case Step::kGather:
      return copy(tag);
    case Step::kCount:
      return give_to_workers(tag, {.op = ByteWork::Op::kChecksum, .fragments = fragments_of(job)});
    case Step::kDeliver:
      return deliver(tag);
    case Step::kFree:
    case Step::kAbandoned:
      break;
  }
  assert(false && "a step of no way");
}

// The file's own queue, or the stand-in if that queue refuses.
DiskQueue& Pipeline::queue_of(OpenFile& file) const {
  if (file.queue->refuses()) file.queue = &queues_.stand_in;
  return *file.queue;
}

void Pipeline::move_direct(unsigned tag) {
  Job& job = jobs_[tag];
  assert(job.done_bytes < job.file_bytes.size_bytes);
  TransferState& transfer = job.transfer();
  ++transfer.stats.operations;
  const File& file = job.part->file();
  DiskQueue& queue = queue_of(*job.part->open);
  job.queue = &queue;
  queue.push(tag, {.op = job.step == Step::kRead ? DiskRequest::Op::kRead : DiskRequest::Op::kWrite,
                   .fd = file.direct_fd(),
                   .offset_bytes = job.file_bytes.offset_bytes + job.done_bytes,
                   .memory = {job.file_bytes.memory + job.done_bytes, job.file_bytes.size_bytes - job.done_bytes},
                   .may_block = file.may_block(),
                   .slot = job.slot,
                   .transfer = &transfer});
}

void Pipeline::move_buffered(unsigned tag) {
  const Job& job = jobs_[tag];
  TransferState& transfer = job.transfer();
  ++transfer.stats.operations;
  give_to_workers(
      tag, {.op = job.step == Step::kWriteCached ? ByteWork::Op::kToCache : ByteWork::Op::kFromCache,
            .fd = job.part->file().buffered_fd(),
            .fragments = cached_io_of(job),
            .page_cache = {.only = job.step == Step::kReadIfCached, .drop = transfer.after == AfterLoad::kDrop}});
}

void Pipeline::give_to_workers(unsigned tag, ByteWork work) {
  Job& job = jobs_[tag];
  work.view = job.view;
  work.sums = sums_of(job);
  work.transfer = job.part->transfer;
  job.queue = &queues_.workers;
  queues_.workers.push(tag, work);
}

// Counting reads the bytes, and so takes their page faults, too.
void Pipeline::populate(unsigned tag) {
  const Job& job = jobs_[tag];
  give_to_workers(tag,
                  {.op = sums_of(job) ? ByteWork::Op::kChecksum : ByteWork::Op::kPopulate,
                   .fragments = fragments_of(job),
                   .touch = job.transfer().is_load() ? ByteWork::Touch::kForWriting : ByteWork::Touch::kForReading});
}

// Copies between the view and the fragments' memory.
void Pipeline::copy(unsigned tag) {
  const Job& job = jobs_[tag];
  assert(has_slot(job.way.view));
  const ByteWork work{.op = job.step == Step::kScatter ? ByteWork::Op::kScatter : ByteWork::Op::kGather,
                      .view = job.view,
                      .fragments = fragments_of(job)};
  job.way.to_device ? copier_->push(tag, static_cast<unsigned>(job.slot), work) : give_to_workers(tag, work);
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
    const std::error_code stuck = reads ? make_error_code(Errc::kTruncated) : errno_code(EIO);
    return fail(tag, interrupted ? errno_code(static_cast<int>(-result)) : stuck);
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
  job.way = way_of(traits_of(*job.part, *job.chunk, Route::kRefused));
  job.next = 0;
  if (job.slot >= 0 && !has_slot(job.way.view)) {
    if (job.stuck) clear_stuck(job);
    free_slots_.push_back(std::exchange(job.slot, -1));
  }
  set_view(job);
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
  if (part.landing && !report_landed(part, chunk)) return;
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
    enter(job, Step::kAbandoned);
    set_stuck(job);
  }
}

void Pipeline::close_job(unsigned tag) {
  Job& job = jobs_[tag];
  TransferState& transfer = job.transfer();
  assert(transfer.jobs > 0 && transfer.outstanding > 0);
  enter(job, Step::kFree);
  if (job.slot >= 0) free_slots_.push_back(job.slot);
  job = Job{};
  free_jobs_.push_back(tag);
  --transfer.outstanding;
  --transfer.jobs;
  if (transfer.failure) settle(transfer);
}

}  // namespace flashpack::internal
