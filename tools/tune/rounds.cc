#include "tools/tune/rounds.h"

#include <algorithm>

namespace flashpack::bench {

namespace {

// So many of the fastest are measured again.
constexpr std::size_t kKept = 3;

bool measured(const std::vector<Cell>& cells, const Setting& setting) {
  return std::any_of(cells.begin(), cells.end(), [&](const Cell& cell) { return cell.setting == setting; });
}

}  // namespace

std::vector<Setting> next_round(const std::vector<Cell>& cells, const Neighbours& neighbours) {
  std::vector<Cell> order = cells;
  std::stable_sort(order.begin(), order.end(), [](const Cell& a, const Cell& b) { return a.gb_per_s > b.gb_per_s; });
  std::vector<Setting> next{cells.front().setting};
  for (std::size_t i = 0; i < std::min(kKept, order.size()); ++i) add_new(next, order[i].setting);
  const std::size_t known = next.size();
  if (neighbours) {
    for (const Setting& beside : neighbours(order.front().setting)) {
      if (!measured(cells, beside)) add_new(next, beside);
    }
  }
  const bool sure = std::min(cells.front().samples, order.front().samples) >= kEnoughSamples;
  return sure && next.size() == known ? std::vector<Setting>() : next;
}

}  // namespace flashpack::bench
