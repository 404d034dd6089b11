#include "engine/steps.h"

#include <cassert>
#include <cerrno>
#include <utility>

#include "engine/ground/error.h"
#include "engine/transfer_state.h"

namespace flashpack::internal {

namespace {

// After this many results in a row without progress (EINTR, EAGAIN, less than a disk block) the part fails. A bound,
// and not tuned.
constexpr unsigned kMaxStalls = 32;

}  // namespace

Steps::Steps(Owner& owner, Queues queues, Copier* copier, std::vector<std::span<std::byte>> slots, Jobs::Limits limits,
             WorkerLimits workers, Tracer tracer)
    : owner_(owner),
      queues_(queues),
      copier_(copier),
      worker_limits_(workers),
      traced_(tracer),
      jobs_(limits, std::move(slots), tracer) {}

bool Steps::has_room(Route route, std::uint32_t queue_depth) const {
  const auto in = [this](Step step) { return jobs_.in(step); };
  if (route == Route::kDirect)
    return in(Step::kRead) + in(Step::kWrite) + in(Step::kGather) + in(Step::kPopulateSlot) < queue_depth;
  return in(Step::kReadIfCached) + in(Step::kReadCached) + in(Step::kWriteCached) < worker_limits_.depth;
}

bool Steps::set_out(Part& part, const Chunk& chunk, Route route) {
  if (jobs_.none_free()) return false;
  const Way way = way_of(part, chunk, route);
  const Step first = way.steps.front();
  const bool skipped = way.may_skip(first) && has_pages(part, chunk, first);
  if (first == Step::kPopulate && !skipped && jobs_.in(first) >= worker_limits_.depth) return false;
  // A store whose memory is late leaves the workers to others until it has come.
  const bool is_late = part.transfer->driver.stuck_copies > 0;
  if (first == Step::kGather && (is_late || jobs_.in(first) >= worker_limits_.gathers)) return false;
  const std::optional<unsigned> tag = jobs_.open(part, chunk, way);
  if (!tag) return false;
  jobs_[*tag].next = skipped ? 1 : 0;
  advance(*tag);
  return true;
}

// Whether the memory that `step` would populate has its pages. Page faults of fresh memory cost more CPU time than a
// read into it (engine_bench, cost/first_touch), and page faults of a mapped file read that file. So a worker takes
// them before the read.
bool Steps::has_pages(const Part& part, const Chunk& chunk, Step step) const {
  if (step == Step::kPopulateSlot) return !jobs_.next_slot_is_fresh(chunk);
  return is_populated({part.plan().fragments_of(chunk).front().memory, chunk.size_bytes});
}

void Steps::reap(std::optional<std::chrono::nanoseconds> patience) {
  const auto complete_all = [this](std::span<const IoCompletion> completions) {
    for (const IoCompletion& completion : completions) complete(completion);
  };
  const std::span<const IoCompletion> ended = queues_.disk.wait(patience);
  if (traced_) now_ = std::chrono::steady_clock::now();  // Steps end and begin after the wait.
  complete_all(ended);
  if (queues_.disk.refuses()) complete_all(queues_.stand_in.wait(std::chrono::nanoseconds(0)));
  complete_all(queues_.workers.wait(std::chrono::nanoseconds(0)));
  if (!copier_) return;
  for (const Copier::EndedCopy& copy : copier_->poll()) on_worked(copy.tag, copy.error);
}

void Steps::look_at_gates() {
  if (jobs_.in(Step::kWait) == 0) return;
  for (unsigned tag = 0; tag < jobs_.size(); ++tag) {
    if (jobs_[tag].step != Step::kWait) continue;
    if (jobs_[tag].part->failure) {
      close_job(tag);
    } else if (!jobs_[tag].transfer().driver.has_shut_gate()) {
      advance(tag);
    }
  }
}

void Steps::advance(unsigned tag) {
  Job& job = jobs_[tag];
  assert(job.next < job.way.steps.size());
  begin(tag, job.way.steps[job.next++]);
}

void Steps::begin(unsigned tag, Step step) {
  Job& job = jobs_[tag];
  jobs_.enter(job, step, now_);
  switch (step) {
    case Step::kRead:
    case Step::kWrite:
      return move_direct(tag);
    case Step::kReadIfCached:
    case Step::kReadCached:
    case Step::kWriteCached:
      ++job.transfer().driver.stats.operations;
      [[fallthrough]];
    case Step::kPopulate:
    case Step::kPopulateSlot:
    case Step::kCount:
      return give_to_workers(tag);
    case Step::kWait:
      return job.transfer().driver.has_shut_gate() ? void() : advance(tag);
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
  assert(false && "a step that no Way holds");
}

void Steps::move_direct(unsigned tag) {
  Job& job = jobs_[tag];
  DiskQueue& queue = job.part->open_file().serving_queue(queues_.stand_in);
  job.queue = &queue;
  ++job.transfer().driver.stats.operations;
  queue.push(tag, job.disk_request());
}

void Steps::give_to_workers(unsigned tag) {
  Job& job = jobs_[tag];
  job.queue = &queues_.workers;
  queues_.workers.push(tag, job.byte_work());
}

void Steps::complete(IoCompletion completion) {
  const auto [tag, result] = completion;
  switch (jobs_[tag].step) {
    case Step::kRead:
    case Step::kWrite:
      return on_direct(tag, result);
    case Step::kReadIfCached:
    case Step::kReadCached:
    case Step::kWriteCached:
      return on_buffered(tag, result);
    case Step::kPopulateSlot:
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

void Steps::on_direct(unsigned tag, std::int64_t result) {
  Job& job = jobs_[tag];
  TransferStats& stats = job.transfer().driver.stats;
  const bool reads = job.step == Step::kRead;
  if (result == -EINVAL || result == -EOPNOTSUPP) return refuse_direct(tag);
  const bool interrupted = result == -EINTR || result == -EAGAIN;
  if (result < 0 && !interrupted) return fail(tag, errno_code(static_cast<int>(-result)));

  const std::uint64_t got = job.done_bytes + (interrupted ? 0 : static_cast<std::uint64_t>(result));
  stats.direct_bytes += got - job.done_bytes;
  if (job.file_bytes.offset_bytes + got >= end_of(*job.chunk)) {
    job.done_bytes = got;
    if (has_slot(job.way.view)) stats.staged_bytes += got;
    return advance(tag);
  }
  if (result == 0 && reads) return fail(tag, Errc::kTruncated);
  // Direct I/O can go on only at a whole disk block. Less than one is no progress and is tried again a bounded number
  // of times.
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

void Steps::on_buffered(unsigned tag, std::int64_t result) {
  const Job& job = jobs_[tag];
  if (job.step == Step::kReadIfCached && result == -EAGAIN) return give_back(tag);
  if (result < 0) return fail(tag, errno_code(static_cast<int>(-result)));
  TransferStats& stats = job.transfer().driver.stats;
  const auto moved = static_cast<std::uint64_t>(result);
  stats.buffered_bytes += moved;
  job.part->has_used_page_cache |= moved > 0;
  const bool in_slot = has_slot(job.way.view);
  if (moved != (in_slot ? job.file_bytes.size_bytes : job.part->plan().wanted_bytes(*job.chunk)))
    return fail(tag, job.step == Step::kWriteCached ? errno_code(EIO) : make_error_code(Errc::kTruncated));
  if (in_slot) stats.staged_bytes += moved;
  advance(tag);
}

// To be called when byte work, or a copy to a device, has ended.
void Steps::on_worked(unsigned tag, std::error_code error) {
  if (jobs_[tag].part->failure) return close_job(tag);
  error ? fail(tag, error) : advance(tag);
}

// Some file systems accept O_DIRECT at open and refuse it at the first read or write. The chunk then goes another way,
// which may not need its slot.
void Steps::refuse_direct(unsigned tag) {
  Job& job = jobs_[tag];
  DriverState& driver = job.transfer().driver;
  assert(job.step == Step::kRead || job.step == Step::kWrite);
  job.part->router().refuse_direct();
  ++driver.stats.retries;
  driver.note_fallback("direct I/O: refused by the file system at the first use");
  jobs_.reroute(job, way_of(*job.part, *job.chunk, Route::kRefused));
  advance(tag);
}

void Steps::deliver(unsigned tag) {
  Part& part = *jobs_[tag].part;
  const Chunk& chunk = *jobs_[tag].chunk;
  part.transfer->done_bytes += part.plan().wanted_bytes(chunk);
  close_job(tag);
  owner_.on_delivered(part, chunk);
}

// To be called when a chunk was not cached, against the router's answer. It is read past the page cache instead.
void Steps::give_back(unsigned tag) {
  Part& part = *jobs_[tag].part;
  assert(part.state() == Part::State::kOpen && part.chunks_open > 0);
  part.router().give_back(*jobs_[tag].chunk);
  ++part.transfer->driver.stats.retries;
  close_job(tag);
  owner_.on_given_back(part);
}

void Steps::fail(unsigned tag, std::error_code code) {
  Part& part = *jobs_[tag].part;
  const Chunk& chunk = *jobs_[tag].chunk;
  const Error error = range_error(code, part.transfer->verb(), part.request.path, chunk.offset_bytes, chunk.size_bytes);
  close_job(tag);
  owner_.on_failed(part, error);
}

void Steps::abandon_chunks_of(Part& part) {
  if (part.jobs == 0) return;
  for (unsigned tag = 0; tag < jobs_.size(); ++tag) {
    Job& job = jobs_[tag];
    const bool copies = job.step == Step::kScatter || job.step == Step::kGather;
    if (job.part != &part || copies || job.step == Step::kWait || job.step == Step::kAbandoned) continue;
    assert(job.queue && job.step != Step::kDeliver);
    part.has_used_page_cache |= job.step == Step::kReadIfCached || job.step == Step::kReadCached;  // Nobody will know.
    job.queue->cancel(tag);
    jobs_.enter(job, Step::kAbandoned, now_);
  }
}

void Steps::close_job(unsigned tag) {
  Part& part = *jobs_[tag].part;
  jobs_.close(tag, now_);
  if (part.failure) owner_.on_came_back(part);
}

}  // namespace flashpack::internal
