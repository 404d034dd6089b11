/// Which way each chunk of a transfer goes: past the page cache or through it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "engine/file.h"
#include "engine/piece_sums.h"
#include "engine/plan.h"
#include "engine/residency.h"
#include "flashpack/engine.h"

namespace flashpack::engine {

/// A file that is read. `direct` turns false when a direct read of it has been refused; `sums` are there when they are
/// to be held against `checksums`.
struct Source {
  explicit Source(File opened)
      : file(std::move(opened)), residency(file.buffered_fd()), direct(file.direct_fd() >= 0) {}

  File file;
  Residency residency;
  bool direct;
  Checksums checksums;
  std::optional<PieceSums> sums;
};

/// Hands out the chunks of a plan, each on one of two routes. The chunks of a route come in file order, the routes
/// independently, so that a half-cached file keeps the disk and the CPUs busy from end to end.
/// Whether a chunk is cached is asked when a route has run out of known chunks, not before.
class Router {
 public:
  enum class Route : std::uint8_t { kDirect, kBuffered, kTaken /* not to be asked for */ };

  Router() = default;
  /// Of a load. Borrows both.
  Router(const Plan& plan, std::vector<Source>& sources, CachePolicy policy);
  /// Of a store, in blocks of `block_bytes`; 0: through the page cache. Borrows the plan.
  Router(const Plan& plan, std::uint32_t block_bytes);

  /// The next chunk of `route`, until take() the same; null when there is none, or when `questions` has run out, which
  /// counts down by one for each chunk that is looked at.
  const Chunk* peek(Route route, unsigned& questions);
  /// Requires: peek(route) was not null.
  void take(Route route) { routes_[cursor(route)++] = Route::kTaken; }
  /// Gives a taken chunk back, to go past the page cache.
  void give_back(const Chunk& chunk);

  /// Whether a chunk on kBuffered is there because it seems to be cached: then the other way is left when it is not.
  bool on_suspicion(const Chunk& chunk) const;

 private:
  std::uint32_t& cursor(Route route) { return route == Route::kDirect ? next_direct_ : next_buffered_; }
  Route route_of(const Chunk& chunk);

  const Plan* plan_ = nullptr;
  std::vector<Source>* sources_ = nullptr;  // Null of a store.
  std::uint32_t block_bytes_ = 0;
  CachePolicy policy_ = CachePolicy::kAuto;
  std::vector<Route> routes_;  // Of the chunks below known_.
  std::uint32_t known_ = 0;
  std::uint32_t next_direct_ = 0;  // Below a cursor every chunk has been taken or is on the other route.
  std::uint32_t next_buffered_ = 0;
};

}  // namespace flashpack::engine
