/// Chooses for each chunk of a file whether it goes past the page cache or through it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/file.h"
#include "engine/plan.h"
#include "engine/residency.h"
#include "flashpack/engine.h"

namespace flashpack::internal {

/// Hands out the chunks of a plan from three lists: those that go past the page cache, those that go through it, and
/// those that go through it though the disk is needed for a few of their pages. Each list has its own cursor through
/// the file, so that a half-cached file keeps disk and CPUs busy to the end. The router asks whether a chunk is cached
/// only when a list has run out, because the answer may change. For a list that stays empty, it asks about the whole
/// file soon.
///
/// find_next(), take() and give_back() are a chunk's life, refuse_direct() changes the routes of the rest, and the
/// other functions ask.
///
/// Move-only. Thread safety: one thread.
class Router {
 public:
  enum class List : std::uint8_t { kPastCache, kThroughCache, kMostlyCached, kTaken /* not to be asked for */ };

  Router() = default;
  /// The router of a load. Borrows the plan; the file must stay open. May block, because it may open the file once more
  /// to ask about the page cache, unless `known` can be borrowed.
  Router(const Plan& plan, const File& file, CachePolicy policy, const Residency* known = nullptr);
  /// The router of a store. Borrows the plan.
  Router(const Plan& plan, const File& file);

  /// Finds the next chunk of `list`, which stays the same until take(). Where the page cache decides, asks it about
  /// chunks, each once, until it has one, and lowers `questions` by one for each. Null if no chunk is left, or if
  /// another question is needed when `questions` is 0.
  const Chunk* find_next(List list, unsigned& questions);
  /// Requires: find_next(list) was not null.
  void take(List list);
  /// Takes back a chunk that was called cached and is not, so that it goes past the page cache. After a few of them, so
  /// do all the others.
  void give_back(const Chunk& chunk);
  /// Whether all chunks have been taken.
  bool exhausted() const noexcept;

  /// Whether direct I/O has not been refused.
  bool direct() const noexcept { return direct_; }
  /// To be called when the file system has refused direct I/O.
  void refuse_direct() noexcept { direct_ = false; }

  /// Whether chunks are on kThroughCache only because they seem to be cached, so that they can go past the page cache
  /// if they are not.
  bool on_suspicion() const noexcept { return residency_ && direct_; }
  /// Why answers about the page cache are less reliable than they could be; empty when they are not.
  std::string fallback_reason() const { return residency_ ? residency_->fallback_reason() : ""; }

 private:
  std::uint32_t& cursor(List list) { return next_[static_cast<std::size_t>(list)]; }
  List list_of(const Chunk& chunk);

  const Plan* plan_ = nullptr;
  std::optional<Residency> residency_;        // Set for a load that chooses chunk by chunk.
  std::optional<std::uint32_t> block_bytes_;  // Set for a store.
  bool direct_ = false;
  std::vector<List> lists_;  // For each chunk below known_, the list that it is on.
  std::uint32_t known_ = 0;
  std::array<std::uint32_t, 3> next_{};  // Cursor of each list: all chunks below are taken or on another list.
};

}  // namespace flashpack::internal
