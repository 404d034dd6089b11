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

// cachestat costs 10 us for a cached chunk: ask about few at a time, or the disk idles while a large hot file is
// examined.
constexpr unsigned kResidencyQuestionsPerTurn = 16;

// A device does not wake anybody: while something is under way there, it is looked at that often. Slots that have
// landed meanwhile are far fewer than a link of today can fill in that time.
constexpr std::chrono::microseconds kDevicePeriod{100};

}  // namespace

unsigned Pipeline::tag_limit(Limits limits, std::size_t slot_count) {
  // A chunk that has been populated goes on to the disk whatever its depth.
  return limits.queue_depth + 3 * limits.worker_depth + static_cast<unsigned>(slot_count);
}

Pipeline::Pipeline(IoQueue& disk, IoQueue& workers, Copier* copier, std::vector<std::span<std::byte>> slots,
                   Limits limits)
    : disk_(disk),
      workers_(workers),
      copier_(copier),
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
    attend_to_gates();
    if (finished()) return;  // After all that may end a transfer: from here on, only something to wait for is left.
    const bool look_again = issue();
    reap(patience(look_again));
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

// Jobs whose transfer's gate has opened go on; those whose transfer has failed have nothing under way to wait for. A
// transfer without jobs is looked at, too: behind a shut gate it may find no slot.
void Pipeline::attend_to_gates() {
  for (std::size_t i = active_.size(); i-- > 0;) {
    TransferState& transfer = *active_[i];
    if (!behind_gate(transfer)) continue;
    std::error_code error;
    if (transfer.gate->open(error)) transfer.gate.reset();
    if (!error) continue;
    give_up(transfer, file_error(error, transfer.verb(), transfer.path_of(0)));
    if (transfer.outstanding == 0) end(transfer);
  }
  if (count(Stage::kWaiting) == 0) return;
  for (unsigned tag = 0; tag < jobs_.size(); ++tag) {
    if (jobs_[tag].stage != Stage::kWaiting) continue;
    if (jobs_[tag].transfer->failure) {
      close_job(tag);
    } else if (!jobs_[tag].transfer->gate) {
      copy(tag);
    }
  }
}

void Pipeline::reap(std::optional<std::chrono::nanoseconds> patience) {
  for (const IoCompletion& completion : disk_.wait(patience)) complete(completion);
  if (&workers_ != &disk_) {
    for (const IoCompletion& completion : workers_.wait(std::chrono::nanoseconds(0))) complete(completion);
  }
  if (!copier_) return;
  for (const Copier::Completion& landed : copier_->poll()) on_copied(landed.tag, landed.error);
}

// How long the loop may sleep; none is for ever.
std::optional<std::chrono::nanoseconds> Pipeline::patience(bool look_again) {
  if (look_again) return std::chrono::nanoseconds(0);
  std::optional<Deadline> first;
  for (const auto& transfer : active_) {
    if (transfer->deadline && !transfer->failure)
      first = std::min(first.value_or(*transfer->deadline), *transfer->deadline);
  }
  const bool device =
      copier_ && (!copier_->idle() || std::any_of(active_.begin(), active_.end(),
                                                  [](const auto& transfer) { return behind_gate(*transfer); }));
  if (!first) return device ? std::optional<std::chrono::nanoseconds>(kDevicePeriod) : std::nullopt;
  // A far deadline plus now would overflow in the clocks below; looking once an hour costs nothing.
  const std::chrono::nanoseconds longest = device ? kDevicePeriod : std::chrono::hours(1);
  return std::clamp<std::chrono::nanoseconds>(*first - std::chrono::steady_clock::now(), {}, longest);
}

// Fills both routes, oldest transfer first. True when it stopped only to answer completions in between.
bool Pipeline::issue() {
  unsigned questions = kResidencyQuestionsPerTurn;
  for (const auto& shared : active_) {
    TransferState& transfer = *shared;
    if (transfer.failure) continue;
    // The disk first: it is the slower one, and both may want the same slots.
    while (depth() < limits_.queue_depth) {
      const Chunk* chunk = transfer.router.peek(Route::kDirect, questions);
      if (!chunk || !issue_direct(transfer, *chunk)) break;
      transfer.router.take(Route::kDirect);
    }
    while (count(Stage::kBuffered) < limits_.worker_depth) {
      const Chunk* chunk = transfer.router.peek(Route::kBuffered, questions);
      if (!chunk || !issue_buffered(transfer, *chunk)) break;
      transfer.router.take(Route::kBuffered);
    }
    if (questions == 0) return true;
    if (count(Stage::kBuffered) >= limits_.worker_depth && depth() >= limits_.queue_depth) break;
  }
  return false;
}

bool Pipeline::issue_buffered(TransferState& transfer, const Chunk& chunk) {
  if (count(Stage::kBuffered) >= limits_.worker_depth || free_jobs_.empty()) return false;
  if (!chunk.on_device) {
    move_buffered(open_job(transfer, chunk));
    return true;
  }
  const auto tag = open_job_with_slot(transfer, chunk);
  if (!tag) return false;
  jobs_[*tag].to_cache = true;
  transfer.is_load() ? move_buffered(*tag) : copy(*tag);
  return true;
}

bool Pipeline::issue_direct(TransferState& transfer, const Chunk& chunk) {
  if (!transfer.direct(chunk.file)) return issue_buffered(transfer, chunk);
  if (free_jobs_.empty()) return false;
  return chunk.in_place ? issue_in_place(transfer, chunk) : issue_staged(transfer, chunk);
}

bool Pipeline::issue_in_place(TransferState& transfer, const Chunk& chunk) {
  const std::span memory(transfer.plan.pieces_of(chunk).front().memory, chunk.size_bytes);
  // Page faults of fresh memory cost more than reading into it, and those of a mapped file read another one: workers
  // take them ahead of the kernel.
  const bool load = transfer.is_load();
  const bool counted = !load && transfer.sums(chunk.file);
  const bool populated = !counted && is_populated(memory);
  if (!populated && count(Stage::kPopulating) >= limits_.worker_depth) return false;
  const unsigned tag = open_job(transfer, chunk);
  Job& job = jobs_[tag];
  job.offset_bytes = chunk.offset_bytes;
  job.memory = memory;
  if (populated) {
    move_direct(tag);
  } else {
    enter(job, Stage::kPopulating);
    // Counting reads them, and so takes their faults, too.
    workers_.push(tag, {.op = counted ? IoRequest::Op::kChecksum : IoRequest::Op::kPopulate,
                        .offset_bytes = job.offset_bytes,
                        .memory = memory,
                        .pieces = transfer.plan.pieces_of(chunk),
                        .for_writing = load,
                        .sums = counted ? take_sums(job) : nullptr});
  }
  return true;
}

bool Pipeline::issue_staged(TransferState& transfer, const Chunk& chunk) {
  const auto tag = open_job_with_slot(transfer, chunk);
  if (!tag) return false;
  if (!transfer.is_load()) {
    copy(*tag);
    return true;
  }
  Job& job = jobs_[*tag];
  const std::uint32_t block_bytes = transfer.file(chunk.file).alignment().block_bytes;
  job.offset_bytes = round_down(chunk.offset_bytes, block_bytes);
  const std::uint64_t end = round_up(chunk.offset_bytes + chunk.size_bytes, block_bytes);
  job.memory = slot_memory(job).first(end - job.offset_bytes);
  move_direct(*tag);
  return true;
}

unsigned Pipeline::open_job(TransferState& transfer, const Chunk& chunk) {
  const unsigned tag = free_jobs_.back();
  free_jobs_.pop_back();
  jobs_[tag] = Job{.transfer = &transfer, .chunk = &chunk};
  ++transfer.outstanding;
  return tag;
}

std::optional<unsigned> Pipeline::open_job_with_slot(TransferState& transfer, const Chunk& chunk) {
  // Who waits behind a gate may wait long; half of the slots stay for others.
  const std::size_t kept = transfer.gate ? slots_.size() / 2 : 0;
  if (free_slots_.size() <= kept) return std::nullopt;
  const unsigned tag = open_job(transfer, chunk);
  Job& job = jobs_[tag];
  job.slot = free_slots_.back();
  free_slots_.pop_back();
  job.offset_bytes = chunk.offset_bytes;
  job.memory = slot_memory(job).first(chunk.size_bytes);
  return tag;
}

// Holds the pieces that were read whole against their checksums.
void Pipeline::verify(const Source& source, TransferState& transfer) {
  constexpr std::uint64_t kPieceBytes = Checksums::kPieceBytes;
  for (std::uint64_t index = 0; index < source.checksums.crc32c.size(); ++index) {
    const std::uint64_t begin = index * kPieceBytes;
    const auto size = static_cast<std::uint32_t>(std::min(kPieceBytes, source.checksums.size_bytes - begin));
    if (source.sums->counted_bytes(index) != size) continue;
    if (source.sums->crc32c(index, size) != source.checksums.crc32c[index]) {
      transfer.failure = Failure(range_error(Errc::kCorrupt, "verify", source.file.path(), begin, size));
      return;
    }
    transfer.stats.verified_bytes += size;
  }
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
    if (!transfer.failure && source.sums) verify(source, transfer);
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
