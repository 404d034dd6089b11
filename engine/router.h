/// Which way each chunk of a file goes: past the page cache or through it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/file.h"
#include "engine/plan.h"
#include "engine/residency.h"
#include "flashpack/engine.h"

namespace flashpack::internal {

/// Hands out the chunks of a plan, each on one of two routes. The chunks of a route come in file order, the routes
/// independently, so that a half-cached file keeps the disk and the CPUs busy from end to end.
/// Whether a chunk is cached is asked when a route has run out of known chunks, not before.
///
/// Move-only. Thread safety: one thread.
class Router {
 public:
  enum class Route : std::uint8_t { kDirect, kBuffered, kTaken /* not to be asked for */ };

  Router() = default;
  /// The router of a load. Borrows the plan; the file must stay open.
  Router(const Plan& plan, const File& file, CachePolicy policy);
  /// The router of a store. Borrows the plan.
  Router(const Plan& plan, const File& file);

  /// The next chunk of `route`, until take() the same; null when there is none, or when `questions` has run out, which
  /// counts down by one for each chunk that is looked at.
  const Chunk* peek(Route route, unsigned& questions);
  /// Requires: peek(route) was not null.
  void take(Route route);
  /// Gives a taken chunk back that was called cached and is not, to go past the page cache.
  void give_back(const Chunk& chunk);
  /// No chunk is left that has not been taken.
  bool exhausted() const noexcept;

  /// Whether direct I/O has not been refused.
  bool direct() const noexcept { return direct_; }
  /// It has been, by the file system.
  void refuse_direct() noexcept { direct_ = false; }

  /// Whether chunks on kBuffered are there because they seem to be cached: then the other way is left when one is not.
  bool on_suspicion() const noexcept { return residency_ && direct_; }
  /// Why the answers about the page cache are worse than they could be; empty when they are not.
  std::string fallback_reason() const { return residency_ ? residency_->fallback_reason() : ""; }

 private:
  std::uint32_t& cursor(Route route) { return route == Route::kDirect ? next_direct_ : next_buffered_; }
  Route route_of(const Chunk& chunk);

  const Plan* plan_ = nullptr;
  std::optional<Residency> residency_;        // Of a load that chooses chunk by chunk.
  std::optional<std::uint32_t> block_bytes_;  // Of a store.
  bool direct_ = false;
  std::vector<Route> routes_;  // Of the chunks below known_.
  std::uint32_t known_ = 0;
  std::uint32_t next_direct_ = 0;  // Below a cursor every chunk has been taken or is on the other route.
  std::uint32_t next_buffered_ = 0;
};

}  // namespace flashpack::internal
