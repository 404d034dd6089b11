// What one chunk goes through, step by step; the loop that leads there is in pipeline.cc.
#include <cassert>
#include <cerrno>
#include <utility>

#include "engine/error.h"
#include "engine/pipeline.h"

namespace flashpack::internal {

namespace {

// Results in a row that bring nothing (EINTR, EAGAIN, less than a block) before it is an error.
constexpr unsigned kMaxStalls = 32;

}  // namespace

void Pipeline::enter(Job& job, Stage stage) {
  if (job.stuck) clear_stuck(job);
  --count(job.stage);
  ++count(job.stage = stage);
  job.since = now_;
}

void Pipeline::set_stuck(Job& job) {
  job.stuck = true;
  --count(job.stage);
  ++job.part->open->stuck;
  ++job.part->file_system->stuck;
  ++stuck_jobs_;
  if (job.slot >= 0) ++stuck_slots_;
}

void Pipeline::clear_stuck(Job& job) {
  job.stuck = false;
  ++count(job.stage);
  --job.part->open->stuck;
  --job.part->file_system->stuck;
  --stuck_jobs_;
  if (job.slot >= 0) --stuck_slots_;
  if (!std::exchange(job.late, false)) return;
  FileSystem& file_system = *job.part->file_system;
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
  const unsigned tag = free_jobs_.back();
  free_jobs_.pop_back();
  jobs_[tag] = Job{.part = &part, .chunk = &chunk};
  ++part.transfer->jobs;
  ++part.transfer->outstanding;
  return tag;
}

std::optional<unsigned> Pipeline::open_job_with_slot(Part& part, const Chunk& chunk) {
  // A chunk behind a gate may wait long; half of the slots stay for others.
  const std::size_t kept = part.transfer->gate ? limits_.slots / 2 : 0;
  const std::size_t used = slots_.size() - free_slots_.size() - stuck_slots_;
  if (free_slots_.empty() || used + kept >= limits_.slots) return std::nullopt;
  const std::size_t spare = slots_.size() - limits_.slots;
  if (has_enough_stuck(part, stuck_slots_ + stuck_share(), spare, spare + limits_.slots / 2)) return std::nullopt;
  const unsigned tag = open_job(part, chunk);
  Job& job = jobs_[tag];
  job.slot = free_slots_.back();
  free_slots_.pop_back();
  job.view = {chunk.offset_bytes, slot_memory(job).first(chunk.size_bytes)};
  return tag;
}

// Its own, as long as that does not refuse.
DiskQueue& Pipeline::queue_of(OpenFile& file) const {
  if (!file.queue) file.queue = &queues_.disk;
  if (file.queue->refuses()) file.queue = &queues_.stand_in;
  return *file.queue;
}

void Pipeline::move_direct(unsigned tag) {
  Job& job = jobs_[tag];
  TransferState& transfer = job.transfer();
  enter(job, Stage::kDirect);
  ++transfer.stats.operations;
  const File& file = job.part->file();
  DiskQueue& queue = queue_of(*job.part->open);
  job.queue = &queue;
  queue.push(tag, {.op = transfer.is_load() ? DiskRequest::Op::kRead : DiskRequest::Op::kWrite,
                   .fd = file.direct_fd(),
                   .offset_bytes = job.view.offset_bytes + job.done_bytes,
                   .memory = job.view.bytes.subspan(job.done_bytes),
                   .may_block = file.may_block(),
                   .slot = job.slot,
                   .transfer = &transfer});
}

void Pipeline::give_to_workers(unsigned tag, ByteWork work) {
  Job& job = jobs_[tag];
  work.transfer = job.part->transfer;
  job.queue = &queues_.workers;
  queues_.workers.push(tag, work);
}

void Pipeline::move_buffered(unsigned tag) {
  Job& job = jobs_[tag];
  TransferState& transfer = job.transfer();
  const bool load = transfer.is_load();
  enter(job, Stage::kBuffered);
  job.only_cached = job.part->router.on_suspicion();
  ++transfer.stats.operations;
  give_to_workers(tag, {.op = load ? ByteWork::Op::kFromCache : ByteWork::Op::kToCache,
                        .fd = job.part->file().buffered_fd(),
                        .view = job.view,
                        .fragments = job.slot >= 0 ? std::span<const Fragment>() : fragments_of(job),
                        .page_cache = {.only = job.only_cached, .drop = transfer.after == AfterLoad::kDrop},
                        .sums = take_sums(job)});
}

// Each byte is to be counted once: null when they have been.
StripeSums* Pipeline::take_sums(Job& job) {
  return std::exchange(job.counted, true) || !job.part->sums ? nullptr : &*job.part->sums;
}

void Pipeline::count_bytes(unsigned tag, StripeSums* sums) {
  Job& job = jobs_[tag];
  enter(job, Stage::kCounting);
  give_to_workers(tag, {.op = ByteWork::Op::kChecksum, .view = job.view, .fragments = fragments_of(job), .sums = sums});
}

// Between the slot and where the fragments are.
void Pipeline::copy(unsigned tag) {
  Job& job = jobs_[tag];
  TransferState& transfer = job.transfer();
  const bool load = transfer.is_load();
  if (load && job.chunk->on_device) {
    if (StripeSums* const sums = take_sums(job)) return count_bytes(tag, sums);
  }
  if (job.chunk->on_device && transfer.gate) return enter(job, Stage::kWaiting);
  enter(job, load ? Stage::kCopying : Stage::kGathering);
  const ByteWork work{.op = load ? ByteWork::Op::kScatter : ByteWork::Op::kGather,
                      .view = job.view,
                      .fragments = fragments_of(job),
                      .sums = job.chunk->on_device ? nullptr : take_sums(job)};
  job.chunk->on_device ? copier_->push(tag, static_cast<unsigned>(job.slot), work) : give_to_workers(tag, work);
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
  TransferStats& stats = job.transfer().stats;
  const bool load = job.transfer().is_load();
  if (result == -EINVAL || result == -EOPNOTSUPP) return refuse_direct(tag);
  const bool interrupted = result == -EINTR || result == -EAGAIN;
  if (result < 0 && !interrupted) return fail(tag, errno_code(static_cast<int>(-result)));

  const std::uint64_t got = job.done_bytes + (interrupted ? 0 : static_cast<std::uint64_t>(result));
  stats.direct_bytes += got - job.done_bytes;
  if (job.view.offset_bytes + got >= job.chunk->offset_bytes + job.chunk->size_bytes) {
    if (job.slot >= 0) stats.staged_bytes += got;
    if (job.slot >= 0 && load) return copy(tag);
    StripeSums* const sums = load ? take_sums(job) : nullptr;
    return sums ? count_bytes(tag, sums) : deliver(tag);
  }
  if (result == 0 && load) return fail(tag, Errc::kTruncated);
  // Direct I/O goes on at whole blocks only. Less than a block is no progress; it is tried again, but not for ever.
  const std::uint64_t resume = round_down(got, job.part->file().alignment().block_bytes);
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
  TransferState& transfer = job.transfer();
  const auto moved = static_cast<std::uint64_t>(result);
  transfer.stats.buffered_bytes += moved;
  if (moved != (job.slot >= 0 ? job.view.bytes.size() : job.part->plan.wanted_bytes(*job.chunk))) {
    return fail(tag, transfer.is_load() ? make_error_code(Errc::kTruncated) : errno_code(EIO));
  }
  if (job.slot >= 0) transfer.stats.staged_bytes += moved;
  job.slot >= 0 && transfer.is_load() ? copy(tag) : deliver(tag);
}

void Pipeline::on_copied(unsigned tag, std::error_code error) {
  const TransferState& transfer = jobs_[tag].transfer();
  if (transfer.failure) return close_job(tag);
  if (error) return fail(tag, error);
  transfer.is_load() ? deliver(tag) : write_slot(tag);
}

void Pipeline::write_slot(unsigned tag) {
  Job& job = jobs_[tag];
  if (job.to_cache) return move_buffered(tag);
  StripeSums* const sums = take_sums(job);
  sums ? count_bytes(tag, sums) : move_direct(tag);
}

void Pipeline::on_counted(unsigned tag) {
  const Job& job = jobs_[tag];
  if (!job.transfer().is_load()) return move_direct(tag);
  job.slot >= 0 ? copy(tag) : deliver(tag);
}

// Some file systems take O_DIRECT at open and refuse it at the first read or write.
void Pipeline::refuse_direct(unsigned tag) {
  Job& job = jobs_[tag];
  TransferState& transfer = job.transfer();
  job.part->router.refuse_direct();
  ++transfer.stats.retries;
  transfer.note_fallback("direct I/O: refused by the file system at the first use");
  if (!transfer.is_load()) return move_buffered(tag);
  if (job.chunk->on_device) {
    job.view = {job.chunk->offset_bytes, slot_memory(job).first(job.chunk->size_bytes)};
  } else if (job.slot >= 0) {
    if (job.stuck) clear_stuck(job);
    free_slots_.push_back(std::exchange(job.slot, -1));
  }
  move_buffered(tag);
}

// It was not in the page cache after all.
void Pipeline::give_back(unsigned tag) {
  const Job& job = jobs_[tag];
  Part& part = *job.part;
  part.router.give_back(*job.chunk);
  ++part.transfer->stats.retries;
  issue_from_now_on(part);
  close_job(tag);
}

void Pipeline::deliver(unsigned tag) {
  const Job& job = jobs_[tag];
  Part& part = *job.part;
  part.transfer->done_bytes += part.plan.wanted_bytes(*job.chunk);
  --part.chunks_open;
  close_job(tag);
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

// Those that are under way are asked to end. Copies end by themselves, and who waits has nothing under way.
void Pipeline::abandon_jobs_of(TransferState& transfer) {
  if (transfer.jobs == 0) return;
  for (unsigned tag = 0; tag < jobs_.size(); ++tag) {
    Job& job = jobs_[tag];
    const bool copies = job.stage == Stage::kCopying || job.stage == Stage::kGathering;
    if (job.stage == Stage::kFree || job.part->transfer != &transfer || copies || job.stage == Stage::kWaiting)
      continue;
    job.queue->cancel(tag);
    enter(job, Stage::kAbandoned);
    set_stuck(job);
  }
}

void Pipeline::close_job(unsigned tag) {
  Job& job = jobs_[tag];
  TransferState& transfer = job.transfer();
  enter(job, Stage::kFree);
  if (job.slot >= 0) free_slots_.push_back(job.slot);
  job = Job{};
  free_jobs_.push_back(tag);
  --transfer.outstanding;
  --transfer.jobs;
  if (transfer.failure) settle(transfer);
}

}  // namespace flashpack::internal
