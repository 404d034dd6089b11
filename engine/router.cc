#include "engine/router.h"

#include <algorithm>
#include <cassert>

namespace flashpack::internal {

Router::Router(const Plan& plan, const File& file, CachePolicy policy, const Residency* known)
    : plan_(&plan), direct_(policy != CachePolicy::kBuffered && file.direct_fd() >= 0), lists_(plan.chunks.size()) {
  if (direct_ && policy == CachePolicy::kAuto)
    residency_.emplace(known ? known->borrow() : Residency(file.buffered_fd()));
}

Router::Router(const Plan& plan, const File& file)
    : plan_(&plan),
      block_bytes_(file.alignment().block_bytes),
      direct_(file.direct_fd() >= 0),
      lists_(plan.chunks.size()) {}

const Chunk* Router::find_next(List list, unsigned& questions) {
  assert(list != List::kTaken);
  std::uint32_t& at = cursor(list);
  while (true) {
    while (at < known_ && lists_[at] != list) ++at;
    if (at < known_) return &plan_->chunks[at];
    if (known_ == lists_.size()) return nullptr;
    if (on_suspicion()) {
      if (questions == 0) return nullptr;
      --questions;
    }
    lists_[known_] = list_of(plan_->chunks[known_]);
    ++known_;
  }
}

void Router::take(List list) {
  std::uint32_t& at = cursor(list);
  assert(at < known_ && lists_[at] == list);
  lists_[at++] = List::kTaken;
}

void Router::give_back(const Chunk& chunk) {
  assert(residency_);
  residency_->report_wrong();
  const auto index = static_cast<std::uint32_t>(&chunk - plan_->chunks.data());
  assert(index < known_ && lists_[index] == List::kTaken);
  lists_[index] = List::kPastCache;
  cursor(List::kPastCache) = std::min(cursor(List::kPastCache), index);
  if (residency_->is_trusted()) return;
  // Answers that were given long before their chunk is read are no better than those to come.
  const auto is_suspected = [](List list) { return list == List::kThroughCache || list == List::kMostlyCached; };
  std::replace_if(lists_.begin(), lists_.begin() + known_, is_suspected, List::kPastCache);
  cursor(List::kPastCache) = 0;
}

bool Router::exhausted() const noexcept {
  const auto is_left = [this](List list) {
    const auto end = lists_.begin() + known_;
    return std::find(lists_.begin() + next_[static_cast<std::size_t>(list)], end, list) != end;
  };
  return known_ == lists_.size() && !is_left(List::kPastCache) && !is_left(List::kThroughCache) &&
         !is_left(List::kMostlyCached);
}

Router::List Router::list_of(const Chunk& chunk) {
  if (!direct_) return List::kThroughCache;
  if (block_bytes_) {
    const bool whole_blocks = (chunk.offset_bytes | chunk.size_bytes) % *block_bytes_ == 0;
    return whole_blocks ? List::kPastCache : List::kThroughCache;
  }
  if (!residency_) return List::kPastCache;
  switch (residency_->look_for(chunk.offset_bytes, chunk.size_bytes)) {
    case Residency::Cached::kAll:
      return List::kThroughCache;
    case Residency::Cached::kMostly:
      return List::kMostlyCached;
    case Residency::Cached::kNo:
      break;
  }
  return List::kPastCache;
}

}  // namespace flashpack::internal
