#include "engine/router.h"

#include <algorithm>
#include <cassert>

namespace flashpack::internal {

Router::Router(const Plan& plan, const File& file, CachePolicy policy)
    : plan_(&plan), direct_(policy != CachePolicy::kBuffered && file.direct_fd() >= 0), routes_(plan.chunks.size()) {
  if (direct_ && policy == CachePolicy::kAuto) residency_.emplace(file.buffered_fd());
}

Router::Router(const Plan& plan, const File& file)
    : plan_(&plan),
      block_bytes_(file.alignment().block_bytes),
      direct_(file.direct_fd() >= 0),
      routes_(plan.chunks.size()) {}

const Chunk* Router::peek(Route route, unsigned& questions) {
  assert(route != Route::kTaken);
  std::uint32_t& at = cursor(route);
  while (true) {
    while (at < known_ && routes_[at] != route) ++at;
    if (at < known_) return &plan_->chunks[at];
    if (known_ == routes_.size() || questions == 0) return nullptr;
    --questions;
    routes_[known_] = route_of(plan_->chunks[known_]);
    ++known_;
  }
}

void Router::take(Route route) {
  std::uint32_t& at = cursor(route);
  assert(at < known_ && routes_[at] == route);
  routes_[at++] = Route::kTaken;
}

void Router::give_back(const Chunk& chunk) {
  assert(residency_);
  residency_->report_wrong();
  const auto index = static_cast<std::uint32_t>(&chunk - plan_->chunks.data());
  assert(index < known_ && routes_[index] == Route::kTaken);
  routes_[index] = Route::kDirect;
  next_direct_ = std::min(next_direct_, index);
}

bool Router::exhausted() const noexcept {
  const auto left = [this](std::uint32_t from, Route route) {
    return std::find(routes_.begin() + from, routes_.begin() + known_, route) != routes_.begin() + known_;
  };
  return known_ == routes_.size() && !left(next_direct_, Route::kDirect) && !left(next_buffered_, Route::kBuffered);
}

Router::Route Router::route_of(const Chunk& chunk) {
  if (!direct_) return Route::kBuffered;
  if (block_bytes_) {
    const bool whole_blocks = (chunk.offset_bytes | chunk.size_bytes) % *block_bytes_ == 0;
    return whole_blocks ? Route::kDirect : Route::kBuffered;
  }
  if (!residency_) return Route::kDirect;
  return residency_->cached(chunk.offset_bytes, chunk.size_bytes) ? Route::kBuffered : Route::kDirect;
}

}  // namespace flashpack::internal
