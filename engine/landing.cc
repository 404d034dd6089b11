#include "engine/landing.h"

#include <algorithm>
#include <cassert>
#include <numeric>
#include <utility>

namespace flashpack::internal {

Landing::Landing(const Plan& plan, std::uint32_t extents, std::uint64_t cell_bytes)
    : fragments_left_(extents), chunks_(plan.chunks.size()), group_of_(plan.chunks.size()) {
  for (const Fragment& fragment : plan.fragments) ++fragments_left_[fragment.extent];
  std::iota(chunks_.begin(), chunks_.end(), 0u);
  const auto cell_of = [&](std::uint32_t chunk) {
    return cell_bytes > 0 ? plan.chunks[chunk].offset_bytes / cell_bytes : std::uint64_t{chunk};
  };
  // The plan has chunks of a high priority first, wherever they are in the file.
  std::ranges::stable_sort(chunks_, {}, [&](std::uint32_t chunk) {
    return std::pair(cell_of(chunk), cell_bytes > 0 ? plan.chunks[chunk].offset_bytes : 0);
  });
  for (std::uint32_t i = 0; i < chunks_.size(); ++i) {
    if (i == 0 || cell_of(chunks_[i]) != cell_of(chunks_[i - 1])) groups_.push_back({.first = i});
    ++groups_.back().size;
    ++groups_.back().left;
    group_of_[chunks_[i]] = static_cast<std::uint32_t>(groups_.size() - 1);
  }
}

std::span<const std::uint32_t> Landing::deliver(std::uint32_t chunk) {
  Group& group = groups_[group_of_[chunk]];
  assert(group.left > 0);
  if (--group.left > 0) return {};
  return std::span(chunks_).subspan(group.first, group.size);
}

}  // namespace flashpack::internal
