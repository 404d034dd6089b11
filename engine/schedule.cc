#include "engine/schedule.h"

#include <algorithm>

namespace flashpack::internal {

namespace {

// cachestat takes 10 us for a cached chunk. Asking about more chunks at a time would leave the disk idle.
constexpr unsigned kResidencyQuestionsPerTurn = 16;

}  // namespace

void Schedule::add(Part& part) {
  Parts& parts = parts_like(part);
  const auto before = [](const Part* a, const Part* b) { return a->turn < b->turn; };
  const auto at = std::lower_bound(parts.begin(), parts.end(), &part, before);
  if (at == parts.end() || *at != &part) parts.insert(at, &part);
}

void Schedule::remove(Part& part) { std::erase(parts_like(part), &part); }

bool Schedule::has(const Part& part) const {
  return std::ranges::any_of(parts_, [&](const Parts& parts) { return std::ranges::count(parts, &part) > 0; });
}

Schedule::Parts& Schedule::parts_like(const Part& part) {
  return parts_[part.plan().total_bytes <= chunk_bytes_ ? kSmall : kLarge];
}

bool Schedule::start_chunks(Steps& steps) {
  unsigned questions = kResidencyQuestionsPerTurn;
  const bool both = !parts_[kSmall].empty() && !parts_[kLarge].empty();
  for (const std::size_t size : {kSmall, kLarge}) {
    const std::uint32_t left_to_others = both && size == kSmall && queue_depth_ > 1 ? 1 : 0;
    Parts& parts = parts_[size];
    for (std::size_t i = 0; i < parts.size();) {
      start_chunks_of(*parts[i], steps, questions, queue_depth_ - left_to_others);
      // This is done before anything else, because a part whose last chunk is under way may end before the next turn.
      if (parts[i]->planned->router.exhausted()) {
        parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(i));
      } else {
        ++i;
      }
      if (questions == 0) return true;
      if (steps.workers_are_busy() && steps.disk_is_busy(queue_depth_ - left_to_others)) break;
    }
  }
  return false;
}

void Schedule::start_chunks_of(Part& part, Steps& steps, unsigned& questions, std::uint32_t queue_depth) {
  if (!steps.may_have_more(part)) return;
  Router& router = part.planned->router;
  // The disk comes first, because it is slower and both routes may need the same slots.
  while (!steps.disk_is_busy(queue_depth)) {
    const Chunk* chunk = router.peek(Router::List::kPastCache, questions);
    if (!chunk || !steps.set_out(part, *chunk, router.direct() ? Steps::Route::kDirect : Steps::Route::kBuffered))
      break;
    router.take(Router::List::kPastCache);
  }
  while (!steps.workers_are_busy()) {
    const Chunk* chunk = router.peek(Router::List::kThroughCache, questions);
    if (!chunk ||
        !steps.set_out(part, *chunk, router.on_suspicion() ? Steps::Route::kSeemsCached : Steps::Route::kBuffered))
      break;
    router.take(Router::List::kThroughCache);
  }
}

}  // namespace flashpack::internal
