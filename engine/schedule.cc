#include "engine/schedule.h"

#include <algorithm>

#include "engine/transfer_state.h"

namespace flashpack::internal {

namespace {

// A question takes 14 us for a chunk of 4 MiB that is cached in small pages (engine_bench, cost/residency), so that
// this many take 0.2 ms. That is a bound and not tuned: in that time a disk of 2 GB/s reads half a MB of the 32 MiB
// that it has in flight.
constexpr unsigned kResidencyQuestionsPerTurn = 16;

Steps::Route route_of(const Router& router, Router::List list) {
  if (list == Router::List::kPastCache) return router.direct() ? Steps::Route::kDirect : Steps::Route::kBuffered;
  return list == Router::List::kThroughCache && router.on_suspicion() ? Steps::Route::kSeemsCached
                                                                      : Steps::Route::kBuffered;
}

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
      // The part is taken off at once, because it may end, with its last chunk, before the next turn.
      if (parts[i]->router().exhausted()) {
        parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(i));
      } else {
        ++i;
      }
      if (questions == 0) return true;
      const auto has_room = [&](Steps::Route route) { return steps.has_room(route, queue_depth_ - left_to_others); };
      if (!has_room(Steps::Route::kDirect) && !has_room(Steps::Route::kBuffered)) break;
    }
  }
  return false;
}

void Schedule::start_chunks_of(Part& part, Steps& steps, unsigned& questions, std::uint32_t queue_depth) {
  if (!steps.may_have_more(part)) return;
  // The disk has its full depth while the next chunks of a store are gathered.
  if (!part.transfer->is_load()) queue_depth += steps.gather_limit();
  Router& router = part.router();
  // The disk comes first, because it is slower and both routes may need the same slots.
  for (const Router::List list : {Router::List::kPastCache, Router::List::kThroughCache, Router::List::kMostlyCached}) {
    const Steps::Route route = route_of(router, list);
    while (steps.has_room(route, queue_depth)) {
      const Chunk* chunk = router.find_next(list, questions);
      if (!chunk || !steps.set_out(part, *chunk, route)) break;
      router.take(list);
    }
  }
}

}  // namespace flashpack::internal
