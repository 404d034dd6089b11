#include "tools/tune/decide.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <vector>

#include "bench/support/measure.h"
#include "tools/tune/choice.h"

namespace flashpack::bench {

namespace {

using Clock = Budget::Clock;

double ratio_of_a_pair(Subject& subject, const Setting& pick, Work way, bool pick_begins) {
  std::array<double, 2> seconds{};
  for (const bool is_pick : {pick_begins, !pick_begins})
    seconds[is_pick ? 1 : 0] = sample(subject, is_pick ? pick : kUsual, way).seconds;
  return seconds[0] / seconds[1];
}

// The best one of the default, which is first, and of the others that are `wanted`.
Setting best_of(std::vector<Cell> cells, const std::function<bool(const Setting&)>& wanted) {
  const auto other = [&](const Cell& cell) { return !wanted(cell.setting); };
  cells.erase(std::remove_if(cells.begin() + 1, cells.end(), other), cells.end());
  return choose(cells).setting;
}

}  // namespace

std::vector<Setting> candidates_of(const Report& report, const Setting& of_the_disk) {
  std::vector<Setting> wanted{report.pick};
  const auto moves_as_the_disk = [&](const Setting& setting) {
    return setting.chunk_bytes == of_the_disk.chunk_bytes && setting.queue_depth == of_the_disk.queue_depth;
  };
  if (!report.page_cache.cells.empty()) wanted.push_back(best_of(report.page_cache.cells, moves_as_the_disk));
  wanted.push_back(of_the_disk);
  const auto has_usual_backend = [](const Setting& setting) { return setting.backend == kUsual.backend; };
  const auto has_usual_chunks = [](const Setting& setting) { return setting.chunk_bytes == kUsual.chunk_bytes; };
  if (!has_usual_backend(of_the_disk)) wanted.push_back(best_of(report.disk.cells, has_usual_backend));
  if (!has_usual_chunks(of_the_disk)) wanted.push_back(best_of(report.disk.cells, has_usual_chunks));
  std::vector<Setting> candidates;
  for (const Setting& each : wanted) {
    if (each != kUsual) add_new(candidates, each);
  }
  return candidates;
}

std::vector<std::vector<double>> in_turns(std::size_t ways, const std::function<double(std::size_t, int)>& pair_of,
                                          const std::function<bool()>& is_over) {
  constexpr std::size_t kLeast = 7;
  std::vector<std::vector<double>> ratios(ways);
  const auto loses_clearly = [](const std::vector<double>& pairs) { return median(pairs) < 1 - 2 * kTolerance; };
  const auto goes_on = [&](std::size_t pairs) {
    if (pairs < kLeast || (pairs < kMostPairs && !is_over())) return true;
    if (std::ranges::none_of(ratios, gains)) return false;
    return pairs < kMostPairs ||
           (pairs < 2 * kMostPairs && !is_better(ratios) && std::ranges::none_of(ratios, loses_clearly));
  };
  for (std::size_t pair = 0; goes_on(pair); ++pair) {
    for (std::size_t way = 0; way < ways; ++way) ratios[way].push_back(pair_of(way, static_cast<int>(pair)));
  }
  return ratios;
}

void decide(Report& report, Subject& subject, const Setting& of_the_disk, Budget::Clock::time_point end) {
  const std::vector<Setting> candidates = candidates_of(report, of_the_disk);
  std::vector<Work> ways;
  if (!report.disk.cells.empty()) ways.push_back(Work::kDisk);
  if (!report.page_cache.cells.empty()) ways.push_back(Work::kPageCache);
  for (std::size_t i = 0; i < candidates.size() && report.kept_default; ++i) {
    if (i > 1 && Clock::now() > end) break;
    const auto share = (end - Clock::now()) / static_cast<int>(candidates.size() - i);
    report.pick = candidates[i];
    const auto ratios = in_turns(
        ways.size(),
        [&](std::size_t way, int pair) { return ratio_of_a_pair(subject, report.pick, ways[way], pair % 2 == 1); },
        [over = Clock::now() + share] { return Clock::now() >= over; });
    report.gains.clear();
    for (const std::vector<double>& pairs : ratios) report.gains.push_back(median(pairs) - 1);
    report.kept_default = !is_better(ratios);
  }
}

}  // namespace flashpack::bench
