#include "engine/pipeline.h"

#include <algorithm>
#include <cassert>
#include <utility>

#include "engine/ground/error.h"

namespace flashpack::internal {

namespace {

// cachestat takes 10 us for a cached chunk. Asking about more chunks at a time would leave the disk idle.
constexpr unsigned kResidencyQuestionsPerTurn = 16;

// A device does not wake the driver, so the driver looks this often for copies that have ended. In that time a link
// empties only a few slots.
constexpr std::chrono::microseconds kDevicePeriod{100};

// A gate waits for the caller's own work, which may take long. The time between two looks at the gate grows with the
// wait, but is never more than an eighth of it, nor more than the longest period.
constexpr int kLooksPerWait = 8;
constexpr std::chrono::milliseconds kLongestGatePeriod{4};

// The longest time until the driver notices that something is late.
constexpr std::chrono::nanoseconds kLookForStuckPeriod = kLate / 5;

}  // namespace

unsigned Pipeline::tag_limit(Limits limits) {
  // A populated chunk goes to the disk even if the queue depth is reached, so more jobs may be in flight.
  return limits.queue_depth + 3 * limits.worker_depth + limits.slots + kStuckLimit;
}

Pipeline::Pipeline(Queues queues, Pool& pool, Copier* copier, std::vector<std::span<std::byte>> slots, Limits limits)
    : queues_(queues),
      pool_(pool),
      copier_(copier),
      slots_(std::move(slots)),
      limits_(limits),
      files_(std::make_shared<FileTable>(&queues.disk)),
      inbox_(std::make_shared<Inbox>()),
      jobs_(tag_limit(limits)) {
  assert(limits.slots > 0 && limits.slots <= slots_.size());
  inbox_->sleeper = &queues_.disk;
  jobs_in(Step::kFree) = static_cast<std::uint32_t>(jobs_.size());
  for (auto tag = static_cast<unsigned>(jobs_.size()); tag-- > 0;) free_jobs_.push_back(tag);
  for (int slot = static_cast<int>(slots_.size()); slot-- > 0;) free_slots_.push_back(slot);
}

void Pipeline::start(std::shared_ptr<TransferState> transfer) {
  const std::lock_guard lock(inbox_->mutex);
  inbox_->started.push_back(std::move(transfer));
  queues_.disk.wake();
}

void Pipeline::attend(std::shared_ptr<TransferState> transfer) noexcept {
  const std::lock_guard lock(inbox_->mutex);
  transfer->next_cancelled = std::exchange(inbox_->cancelled, transfer);
  queues_.disk.wake();
}

void Pipeline::close() noexcept {
  const std::lock_guard lock(inbox_->mutex);
  inbox_->closing = true;
  queues_.disk.wake();
}

void Pipeline::Inbox::answer(std::shared_ptr<TransferState> transfer, Part& part) noexcept {
  std::unique_lock lock(mutex);
  if (!sleeper) {  // The driver has ended, so this thread has to close the file.
    lock.unlock();
    part.open.reset();
    return;
  }
  answers.push_back({std::move(transfer), &part});
  sleeper->wake();
}

bool Pipeline::run() {
  const bool refused = queues_.disk.refuses();
  while (true) {
    now_ = std::chrono::steady_clock::now();
    admit();
    expire();
    attend_to_gates();
    look_for_stuck();
    if (finished()) return true;  // Checked after all calls that may end a transfer.
    open_next();
    const bool look_again = issue();
    reap(patience(look_again));
    if (queues_.disk.refuses() && !refused) return false;
  }
}

// Whether run() may return. Threads that are late in opening or closing files are left behind.
bool Pipeline::finished() {
  const std::lock_guard lock(inbox_->mutex);
  const bool nothing_left = inbox_->closing && unfinished_ == 0 && with_threads_.size() == late_parts_ &&
                            inbox_->started.empty() && inbox_->answers.empty();
  assert(!nothing_left || (free_jobs_.size() == jobs_.size() && free_slots_.size() == slots_.size()));
  assert(!nothing_left || (stuck_jobs_ == 0 && stuck_slots_ == 0));
  if (nothing_left) inbox_->sleeper = nullptr;
  return nothing_left;
}

// Lets the waiting chunks of a transfer go on if its gate has opened or the transfer has failed. Transfers without a
// chunk under way are looked at, too, because they may find no slot while their gate is shut.
void Pipeline::attend_to_gates() {
  for (std::size_t i = gated_.size(); i-- > 0;) {
    TransferState& transfer = *gated_[i];
    std::error_code error;
    if (!transfer.failure && transfer.gate->open(error)) transfer.gate.reset();
    if (transfer.gate && !transfer.failure && !error) continue;
    gates_changed_ = now_;
    gated_.erase(gated_.begin() + static_cast<std::ptrdiff_t>(i));
    if (error) give_up(transfer, file_error(error, transfer.verb(), transfer.path()));
  }
  if (jobs_in(Step::kWait) == 0) return;
  for (unsigned tag = 0; tag < jobs_.size(); ++tag) {
    if (jobs_[tag].step != Step::kWait) continue;
    if (jobs_[tag].transfer().failure) {
      close_job(tag);
    } else if (!jobs_[tag].transfer().gate) {
      advance(tag);
    }
  }
}

void Pipeline::reap(std::optional<std::chrono::nanoseconds> patience) {
  complete_all(queues_.disk.wait(patience));
  if (queues_.disk.refuses()) complete_all(queues_.stand_in.wait(std::chrono::nanoseconds(0)));
  complete_all(queues_.workers.wait(std::chrono::nanoseconds(0)));
  if (!copier_) return;
  for (const Copier::Completion& landed : copier_->poll()) on_worked(landed.tag, landed.error);
}

void Pipeline::complete_all(std::span<const IoCompletion> completions) {
  for (const IoCompletion& completion : completions) complete(completion);
}

// How long the loop may sleep; empty is for ever.
std::optional<std::chrono::nanoseconds> Pipeline::patience(bool look_again) {
  if (look_again) return std::chrono::nanoseconds(0);
  if (copier_ && !copier_->idle()) return kDevicePeriod;
  const bool something_may_be_late = free_jobs_.size() < jobs_.size() || !with_threads_.empty();
  if (!something_may_be_late && deadlines_.empty() && gated_.empty()) return std::nullopt;
  std::chrono::nanoseconds longest = something_may_be_late ? kLookForStuckPeriod : std::chrono::hours(1);
  if (!gated_.empty()) {
    longest = std::clamp<std::chrono::nanoseconds>((now_ - gates_changed_) / kLooksPerWait, kDevicePeriod,
                                                   kLongestGatePeriod);
  }
  if (!deadlines_.empty()) {
    // A sleep of an hour at most, because now plus a far deadline would overflow in the wait.
    longest =
        std::clamp<std::chrono::nanoseconds>(deadlines_.begin()->first - std::chrono::steady_clock::now(), {}, longest);
  }
  return longest;
}

void Pipeline::look_for_stuck() {
  if (now_ - looked_for_stuck_ < kLookForStuckPeriod) return;
  looked_for_stuck_ = now_;
  look_for_late_parts();
  pool_.replace_late_threads();
  for (Job& job : jobs_) {
    if (may_be_late(job.step) && !job.late && now_ - job.since >= kLate) set_late(job);
  }
}

// Issues chunks of both routes, in the order in which transfers were started. Small loads go before large ones, to
// which they leave one place of the queue depth. True if it stopped only to handle completions first.
bool Pipeline::issue() {
  unsigned questions = kResidencyQuestionsPerTurn;
  const bool both = !issuing_[kSmall].empty() && !issuing_[kLarge].empty();
  for (const std::size_t size : {kSmall, kLarge}) {
    const std::uint32_t left_to_others = both && size == kSmall && limits_.queue_depth > 1 ? 1 : 0;
    std::vector<Part*>& parts = issuing_[size];
    for (std::size_t i = 0; i < parts.size();) {
      issue_from(*parts[i], questions, limits_.queue_depth - left_to_others);
      if (questions == 0) return true;
      if (parts[i]->router.exhausted()) {
        parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(i));
      } else {
        ++i;
      }
      if (buffered() >= limits_.worker_depth && depth() >= limits_.queue_depth - left_to_others) break;
    }
  }
  return false;
}

void Pipeline::issue_from(Part& part, unsigned& questions, std::uint32_t queue_depth) {
  if (has_enough_stuck(part, stuck_jobs_, kStuckLimit / 2, kStuckLimit * 3 / 4)) return;
  // The disk comes first, because it is slower and both routes may need the same slots.
  while (depth() < queue_depth) {
    const Chunk* chunk = part.router.peek(Router::Route::kDirect, questions);
    if (!chunk || !set_out(part, *chunk, part.router.direct() ? Route::kDirect : Route::kBuffered)) break;
    part.router.take(Router::Route::kDirect);
  }
  while (buffered() < limits_.worker_depth) {
    const Chunk* chunk = part.router.peek(Router::Route::kBuffered, questions);
    if (!chunk || !set_out(part, *chunk, part.router.on_suspicion() ? Route::kSeemsCached : Route::kBuffered)) break;
    part.router.take(Router::Route::kBuffered);
  }
}

// Starts a chunk on its way. False, without any effect, if there is no room for it now.
bool Pipeline::set_out(Part& part, const Chunk& chunk, Route route) {
  if (free_jobs_.empty() || (route != Route::kDirect && buffered() >= limits_.worker_depth)) return false;
  const Way way = way_of(traits_of(part, chunk, route));
  // Page faults of fresh memory cost more than a read into it, and page faults of a mapped file read that file. So a
  // worker takes them before the read.
  bool populated = false;
  if (way.steps.front() == Step::kPopulate) {
    const std::span memory(part.plan.fragments_of(chunk).front().memory, chunk.size_bytes);
    populated = way.counts_in != Step::kPopulate && is_populated(memory);
    if (!populated && jobs_in(Step::kPopulate) >= limits_.worker_depth) return false;
  }
  const std::optional<unsigned> tag = has_slot(way.view) ? open_job_with_slot(part, chunk) : open_job(part, chunk);
  if (!tag) return false;
  Job& job = jobs_[*tag];
  job.way = way;
  job.next = populated ? 1 : 0;
  set_view(job);
  advance(*tag);
  return true;
}

ChunkTraits Pipeline::traits_of(const Part& part, const Chunk& chunk, Route route) {
  using Memory = ChunkTraits::Memory;
  assert(!chunk.on_device || !chunk.in_place);
  const bool past_cache = route == Route::kDirect || route == Route::kRefused;
  const Memory on_host = past_cache && !chunk.in_place ? Memory::kSlot : Memory::kInPlace;
  return {.direction = part.transfer->direction,
          .route = route,
          .memory = chunk.on_device ? Memory::kDevice : on_host,
          .counted = part.sums.has_value()};
}

void Pipeline::set_view(Job& job) const {
  const Chunk& chunk = *job.chunk;
  const std::uint32_t block_bytes = job.way.view == View::kBlocks ? job.part->file().alignment().block_bytes : 1;
  const std::uint64_t begin = round_down(chunk.offset_bytes, block_bytes);
  const std::uint64_t end = round_up(end_of(chunk), block_bytes);
  job.view = {};
  if (has_slot(job.way.view)) {
    const std::span<std::byte> slot = slots_[static_cast<std::size_t>(job.slot)];
    assert(end - begin <= slot.size());
    job.view = {begin, slot.first(end - begin)};
  } else if (job.way.view == View::kInPlace) {
    job.view = {begin, {fragments_of(job).front().memory, end - begin}};
  }
  job.file_bytes = {begin, end - begin, job.view.bytes.data()};
}

}  // namespace flashpack::internal
