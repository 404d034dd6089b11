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
constexpr std::chrono::nanoseconds kLookForLatePeriod = kLate / 5;

}  // namespace

unsigned Pipeline::tag_limit(Limits limits) {
  // A populated chunk goes to the disk even if the queue depth is reached, so more jobs may be in flight.
  const unsigned wanted = limits.queue_depth + 3 * limits.worker_depth + limits.slots + Jobs::kStuckLimit;
  return std::min(wanted, DiskQueue::kMostTags);  // With so many chunks under way, one more can wait.
}

Pipeline::Pipeline(Queues queues, Pool& pool, Copier* copier, std::vector<std::span<std::byte>> slots, Limits limits,
                   Tracer tracer)
    : queues_(queues),
      pool_(pool),
      copier_(copier),
      limits_(limits),
      tracer_(tracer),
      files_(pool, queues.disk, {.chunk_bytes = limits.chunk_bytes, .at_once_bytes = limits.at_once_bytes}),
      steps_(*this, queues, copier, std::move(slots),
             {.tags = tag_limit(limits), .queue_depth = limits.queue_depth, .slots = limits.slots}, limits.worker_depth,
             tracer),
      parts_(Mounts::of_process, tracer) {}

bool Pipeline::run() {
  const bool refused = queues_.disk.refuses();
  while (true) {
    now_ = std::chrono::steady_clock::now();
    steps_.set_time(now_);
    admit();
    expire();
    attend_to_gates();
    look_for_late();
    if (finished()) return true;  // Checked after all calls that may end a transfer.
    while (Part* const part = parts_.next()) part->planned ? begin_issuing(*part) : open(*part);
    const bool look_again = issue();
    steps_.reap(patience(look_again));
    if (queues_.disk.refuses() && !refused) return false;
  }
}

// Whether run() may return. Threads that are late in opening or closing files are left behind.
bool Pipeline::finished() {
  const bool nothing_left = unfinished_ == 0 &&
                            std::ranges::all_of(parts_.with_threads(), [](const Part* part) { return part->late; }) &&
                            inbox().end();
  assert(!nothing_left || steps_.idle());
  return nothing_left;
}

// Lets the waiting chunks of a transfer go on if its gates have opened or the transfer has failed. Transfers without a
// chunk under way are looked at, too, because they may find no slot while a gate is shut.
void Pipeline::attend_to_gates() {
  for (std::size_t i = gated_.size(); i-- > 0;) {
    TransferState& transfer = *gated_[i];
    auto& gates = transfer.driver.gates;
    std::error_code error;
    if (!transfer.driver.failure) std::erase_if(gates, [&](const auto& gate) { return gate->open(error); });
    if (!gates.empty() && !transfer.driver.failure && !error) continue;
    gates_changed_ = now_;
    gated_.erase(gated_.begin() + static_cast<std::ptrdiff_t>(i));
    if (error) give_up(transfer, file_error(error, transfer.verb(), transfer.driver.path()));
  }
  steps_.look_at_gates();
}

// How long the loop may sleep; empty is for ever.
std::optional<std::chrono::nanoseconds> Pipeline::patience(bool look_again) {
  if (look_again) return std::chrono::nanoseconds(0);
  if (copier_ && !copier_->idle()) return kDevicePeriod;
  const bool something_may_be_late = !steps_.idle() || !parts_.with_threads().empty();
  if (!something_may_be_late && deadlines_.empty() && gated_.empty()) return std::nullopt;
  std::chrono::nanoseconds longest = something_may_be_late ? kLookForLatePeriod : std::chrono::hours(1);
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

void Pipeline::look_for_late() {
  if (now_ - looked_for_late_ < kLookForLatePeriod) return;
  looked_for_late_ = now_;
  look_for_late_parts();
  pool_.replace_late_threads();
  if (steps_.mark_late()) parts_.read_mounts();
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
      // This is done before anything else, because a part whose last chunk is under way may end before the next turn.
      if (parts[i]->planned->router.exhausted()) {
        parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(i));
      } else {
        ++i;
      }
      if (questions == 0) return true;
      if (steps_.workers_are_busy() && steps_.disk_is_busy(limits_.queue_depth - left_to_others)) break;
    }
  }
  return false;
}

void Pipeline::issue_from(Part& part, unsigned& questions, std::uint32_t queue_depth) {
  if (!steps_.may_have_more(part)) return;
  Router& router = part.planned->router;
  // The disk comes first, because it is slower and both routes may need the same slots.
  while (!steps_.disk_is_busy(queue_depth)) {
    const Chunk* chunk = router.peek(Router::List::kPastCache, questions);
    if (!chunk || !steps_.set_out(part, *chunk, router.direct() ? Steps::Route::kDirect : Steps::Route::kBuffered))
      break;
    router.take(Router::List::kPastCache);
  }
  while (!steps_.workers_are_busy()) {
    const Chunk* chunk = router.peek(Router::List::kThroughCache, questions);
    if (!chunk ||
        !steps_.set_out(part, *chunk, router.on_suspicion() ? Steps::Route::kSeemsCached : Steps::Route::kBuffered))
      break;
    router.take(Router::List::kThroughCache);
  }
}

}  // namespace flashpack::internal
