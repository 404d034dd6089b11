#include "engine/router.h"

#include <algorithm>

namespace flashpack::engine {

Router::Router(const Plan& plan, std::vector<Source>& sources, CachePolicy policy)
    : plan_(&plan), sources_(&sources), policy_(policy), routes_(plan.chunks.size()) {}

Router::Router(const Plan& plan, std::uint32_t block_bytes)
    : plan_(&plan), block_bytes_(block_bytes), policy_(CachePolicy::kDirect), routes_(plan.chunks.size()) {}

const Chunk* Router::peek(Route route, unsigned& questions) {
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

void Router::give_back(const Chunk& chunk) {
  const auto index = static_cast<std::uint32_t>(&chunk - plan_->chunks.data());
  routes_[index] = Route::kDirect;
  next_direct_ = std::min(next_direct_, index);
}

bool Router::on_suspicion(const Chunk& chunk) const {
  return policy_ == CachePolicy::kAuto && (*sources_)[chunk.file].direct;
}

Router::Route Router::route_of(const Chunk& chunk) {
  if (!sources_) {
    const bool whole_blocks = block_bytes_ > 0 && (chunk.offset_bytes | chunk.size_bytes) % block_bytes_ == 0;
    return whole_blocks ? Route::kDirect : Route::kBuffered;
  }
  if (policy_ == CachePolicy::kBuffered) return Route::kBuffered;
  Source& source = (*sources_)[chunk.file];
  if (!source.direct) return Route::kBuffered;
  if (policy_ == CachePolicy::kDirect) return Route::kDirect;
  return source.residency.cached(chunk.offset_bytes, chunk.size_bytes) ? Route::kBuffered : Route::kDirect;
}

}  // namespace flashpack::engine
