#include "engine/pipeline.h"

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <utility>

#include "engine/error.h"
#include "engine/workers.h"

namespace flashpack::engine {

namespace {

using Route = Router::Route;

// Results in a row that bring nothing (EINTR, EAGAIN, less than a block) before it is an error.
constexpr unsigned kMaxStalls = 32;

// cachestat costs 10 us for a cached chunk: ask about few at a time, or the disk idles while a large hot file is
// examined.
constexpr unsigned kResidencyQuestionsPerTurn = 16;

}  // namespace

unsigned Pipeline::tag_limit(Limits limits, std::size_t slot_count) {
  // A chunk that has been populated goes on to the disk whatever its depth.
  return limits.queue_depth + 3 * limits.worker_depth + static_cast<unsigned>(slot_count);
}

Pipeline::Pipeline(IoQueue& disk, IoQueue& workers, std::vector<std::span<std::byte>> slots, Limits limits)
    : disk_(disk),
      workers_(workers),
      slots_(std::move(slots)),
      limits_(limits),
      jobs_(tag_limit(limits, slots_.size())) {
  count(Stage::kFree) = static_cast<std::uint32_t>(jobs_.size());
  for (auto tag = static_cast<unsigned>(jobs_.size()); tag-- > 0;) free_jobs_.push_back(tag);
  for (int slot = static_cast<int>(slots_.size()); slot-- > 0;) free_slots_.push_back(slot);
}

// Waking is done under the lock: once run() has seen what was said, it may return and the queue be gone.
void Pipeline::start(std::shared_ptr<TransferState> transfer) {
  const std::lock_guard lock(mutex_);
  inbox_.push_back(std::move(transfer));
  disk_.wake();
}

void Pipeline::attend() noexcept {
  attention_.store(true);
  disk_.wake();
}

void Pipeline::close() noexcept {
  const std::lock_guard lock(mutex_);
  closing_ = true;
  disk_.wake();
}

void Pipeline::run() {
  while (true) {
    admit();
    attend_to_cancels_and_deadlines();
    if (finished()) return;  // After all that may end a transfer: from here on, only something to wait for is left.
    const bool look_again = issue();
    for (const IoCompletion& completion : disk_.wait(patience(look_again))) complete(completion);
    if (&workers_ != &disk_) {
      for (const IoCompletion& completion : workers_.wait(std::chrono::nanoseconds(0))) complete(completion);
    }
  }
}

void Pipeline::admit() {
  {
    const std::lock_guard lock(mutex_);
    admitted_.swap(inbox_);
  }
  for (auto& transfer : admitted_) {
    TransferState& state = *transfer;
    active_.push_back(std::move(transfer));
    if (state.cancel_requested)
      attention_.store(true);  // What cancel() said may have been looked for before it was here.
    if (state.failure || state.chunks_open == 0) end(state);
  }
  admitted_.clear();
}

void Pipeline::attend_to_cancels_and_deadlines() {
  const auto now = std::chrono::steady_clock::now();
  const bool cancels = attention_.exchange(false);
  for (std::size_t i = active_.size(); i-- > 0;) {
    TransferState& transfer = *active_[i];
    const bool late = transfer.deadline && *transfer.deadline <= now;
    if (transfer.failure || !(late || (cancels && transfer.cancel_requested))) continue;
    give_up(transfer,
            file_error(late ? Errc::kDeadlineExceeded : Errc::kCancelled, transfer.verb(), transfer.path_of(0)));
    if (transfer.outstanding == 0) end(transfer);
  }
}

// How long the loop may sleep; none is for ever.
std::optional<std::chrono::nanoseconds> Pipeline::patience(bool look_again) const {
  if (look_again) return std::chrono::nanoseconds(0);
  std::optional<Deadline> first;
  for (const auto& transfer : active_) {
    if (transfer->deadline && !transfer->failure)
      first = std::min(first.value_or(*transfer->deadline), *transfer->deadline);
  }
  if (!first) return std::nullopt;
  // A far deadline plus now would overflow in the clocks below; looking once an hour costs nothing.
  return std::clamp<std::chrono::nanoseconds>(*first - std::chrono::steady_clock::now(), std::chrono::nanoseconds(0),
                                              std::chrono::hours(1));
}

// Fills both routes, oldest transfer first. True when it stopped only to answer completions in between.
bool Pipeline::issue() {
  unsigned questions = kResidencyQuestionsPerTurn;
  for (const auto& shared : active_) {
    TransferState& transfer = *shared;
    if (transfer.failure) continue;
    while (count(Stage::kBuffered) < limits_.worker_depth) {
      const Chunk* chunk = transfer.router.peek(Route::kBuffered, questions);
      if (!chunk || !issue_buffered(transfer, *chunk)) break;
      transfer.router.take(Route::kBuffered);
    }
    while (count(Stage::kReading) < limits_.queue_depth) {
      const Chunk* chunk = transfer.router.peek(Route::kDirect, questions);
      if (!chunk || !issue_direct(transfer, *chunk)) break;
      transfer.router.take(Route::kDirect);
    }
    if (questions == 0) return true;
    if (count(Stage::kBuffered) >= limits_.worker_depth && count(Stage::kReading) >= limits_.queue_depth) break;
  }
  return false;
}

bool Pipeline::issue_buffered(TransferState& transfer, const Chunk& chunk) {
  if (count(Stage::kBuffered) >= limits_.worker_depth || free_jobs_.empty()) return false;
  move_buffered(open_job(transfer, chunk));
  return true;
}

bool Pipeline::issue_direct(TransferState& transfer, const Chunk& chunk) {
  if (!transfer.sources[chunk.file].direct) return issue_buffered(transfer, chunk);
  if (free_jobs_.empty()) return false;
  return chunk.in_place ? issue_in_place(transfer, chunk) : issue_staged(transfer, chunk);
}

bool Pipeline::issue_in_place(TransferState& transfer, const Chunk& chunk) {
  const std::span memory(transfer.plan.pieces_of(chunk).front().memory, chunk.size_bytes);
  // Fresh memory costs more in page faults than in reading; then workers take the faults ahead of the kernel.
  const bool populated = is_populated(memory);
  if (!populated && count(Stage::kPopulating) >= limits_.worker_depth) return false;
  const unsigned tag = open_job(transfer, chunk);
  jobs_[tag].offset_bytes = chunk.offset_bytes;
  jobs_[tag].memory = memory;
  if (populated) {
    read_direct(tag);
  } else {
    enter(jobs_[tag], Stage::kPopulating);
    workers_.push(tag, {.op = IoRequest::Op::kPopulate, .memory = memory});
  }
  return true;
}

bool Pipeline::issue_staged(TransferState& transfer, const Chunk& chunk) {
  if (free_slots_.empty()) return false;
  const unsigned tag = open_job(transfer, chunk);
  Job& job = jobs_[tag];
  job.slot = free_slots_.back();
  free_slots_.pop_back();
  const std::uint32_t block_bytes = transfer.sources[chunk.file].file.block_bytes();
  job.offset_bytes = round_down(chunk.offset_bytes, block_bytes);
  const std::uint64_t end = round_up(chunk.offset_bytes + chunk.size_bytes, block_bytes);
  job.memory = slots_[static_cast<std::size_t>(job.slot)].first(end - job.offset_bytes);
  read_direct(tag);
  return true;
}

unsigned Pipeline::open_job(TransferState& transfer, const Chunk& chunk) {
  const unsigned tag = free_jobs_.back();
  free_jobs_.pop_back();
  jobs_[tag] = Job{.transfer = &transfer, .chunk = &chunk};
  ++transfer.outstanding;
  return tag;
}

void Pipeline::read_direct(unsigned tag) {
  Job& job = jobs_[tag];
  enter(job, Stage::kReading);
  ++job.transfer->stats.operations;
  const File& file = job.transfer->sources[job.chunk->file].file;
  disk_.push(tag, {.op = IoRequest::Op::kRead,
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
  ++transfer.stats.operations;
  workers_.push(tag, {.op = load ? IoRequest::Op::kReadPieces : IoRequest::Op::kWritePieces,
                      .fd = load ? transfer.sources[job.chunk->file].file.buffered_fd() : transfer.store_fd,
                      .pieces = transfer.plan.pieces_of(*job.chunk),
                      .page_cache = {.only = job.only_cached, .drop = transfer.after == AfterLoad::kDrop}});
}

void Pipeline::complete(IoCompletion completion) {
  const auto [tag, result] = completion;
  switch (jobs_[tag].stage) {
    case Stage::kPopulating:
      return read_direct(tag);
    case Stage::kReading:
      return on_direct_read(tag, result);
    case Stage::kScattering:
      return deliver(tag);
    case Stage::kBuffered:
      return on_buffered(tag, result);
    case Stage::kAbandoned:
      return close_job(tag);
    case Stage::kFree:
      break;
  }
  assert(false && "completion of a job that is not under way");
}

void Pipeline::on_direct_read(unsigned tag, std::int64_t result) {
  Job& job = jobs_[tag];
  TransferStats& stats = job.transfer->stats;
  if (result == -EINVAL || result == -EOPNOTSUPP) return refuse_direct(tag);
  const bool interrupted = result == -EINTR || result == -EAGAIN;
  if (result < 0 && !interrupted) return fail(tag, errno_code(static_cast<int>(-result)));

  const std::uint64_t got = job.done_bytes + (interrupted ? 0 : static_cast<std::uint64_t>(result));
  stats.direct_bytes += got - job.done_bytes;
  if (job.offset_bytes + got >= job.chunk->offset_bytes + job.chunk->size_bytes) {
    if (job.slot < 0) return deliver(tag);
    stats.staged_bytes += got;
    enter(job, Stage::kScattering);
    return workers_.push(tag, {.op = IoRequest::Op::kScatter,
                               .offset_bytes = job.offset_bytes,
                               .memory = job.memory,
                               .pieces = job.transfer->plan.pieces_of(*job.chunk)});
  }
  if (result == 0) return fail(tag, Errc::kTruncated);
  // Direct reads go on at whole blocks only. Less than a block is no progress; it is tried again, but not for ever.
  const std::uint64_t resume = round_down(got, job.transfer->sources[job.chunk->file].file.block_bytes());
  job.stalls = resume > job.done_bytes ? 0 : job.stalls + 1;
  if (job.stalls > kMaxStalls) return fail(tag, interrupted ? errno_code(static_cast<int>(-result)) : Errc::kTruncated);
  job.done_bytes = resume;
  ++stats.retries;
  read_direct(tag);
}

void Pipeline::on_buffered(unsigned tag, std::int64_t result) {
  const Job& job = jobs_[tag];
  if (job.only_cached && result == -EAGAIN) return give_back(tag);
  if (result < 0) return fail(tag, errno_code(static_cast<int>(-result)));
  const auto moved = static_cast<std::uint64_t>(result);
  job.transfer->stats.buffered_bytes += moved;
  if (moved == job.transfer->plan.wanted_bytes(*job.chunk)) return deliver(tag);
  fail(tag, job.transfer->is_load() ? make_error_code(Errc::kTruncated) : errno_code(EIO));
}

// Some file systems take O_DIRECT at open and refuse it at the first read.
void Pipeline::refuse_direct(unsigned tag) {
  Job& job = jobs_[tag];
  job.transfer->sources[job.chunk->file].direct = false;
  if (job.slot >= 0) free_slots_.push_back(std::exchange(job.slot, -1));
  job.memory = {};
  ++job.transfer->stats.retries;
  job.transfer->note_fallback("direct I/O: refused by the file system at the first read");
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

// From here on nothing is issued for it; what is under way is asked to end, and waited for. Copies out of slots end by
// themselves.
void Pipeline::give_up(TransferState& transfer, const Error& error) {
  transfer.failure = Failure(error);
  for (unsigned tag = 0; tag < jobs_.size(); ++tag) {
    Job& job = jobs_[tag];
    if (job.transfer != &transfer || job.stage == Stage::kScattering) continue;
    (job.stage == Stage::kReading ? disk_ : workers_).cancel(tag);
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

void Pipeline::end(TransferState& transfer) {
  const auto at =
      std::find_if(active_.begin(), active_.end(), [&](const auto& other) { return other.get() == &transfer; });
  const std::shared_ptr<TransferState> keep = std::move(*at);
  active_.erase(at);
  for (const Source& source : transfer.sources) {
    if (!transfer.failure && !source.file.unchanged()) {
      transfer.failure = Failure(file_error(Errc::kFileChanged, "read", source.file.path()));
    }
    transfer.note_fallback(source.residency.fallback_reason());
    if (transfer.after == AfterLoad::kDrop && transfer.stats.buffered_bytes > 0) source.file.drop_from_cache();
  }
  transfer.sources.clear();
  transfer.note_fallback(disk_.fallback_reason());
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - transfer.started;
  transfer.stats.seconds = elapsed.count();
  transfer.finish(std::move(transfer.failure), keep);
}

}  // namespace flashpack::engine
