#include "engine/router.h"

namespace flashpack::engine {

Router::Router(const Plan& plan, const std::vector<Source>& sources, CachePolicy policy)
    : plan_(&plan), sources_(&sources), policy_(policy), routes_(plan.chunks.size()) {}

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

Router::Route Router::route_of(const Chunk& chunk) const {
  if (sources_->empty() || policy_ == CachePolicy::kBuffered) return Route::kBuffered;
  const Source& source = (*sources_)[chunk.file];
  if (!source.direct) return Route::kBuffered;
  if (policy_ == CachePolicy::kDirect) return Route::kDirect;
  return source.file.resident(chunk.offset_bytes, chunk.size_bytes) ? Route::kBuffered : Route::kDirect;
}

}  // namespace flashpack::engine
