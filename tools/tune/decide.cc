#include "tools/tune/decide.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <vector>

#include "bench/support/measure.h"
#include "tools/tune/choice.h"

namespace flashpack::bench {

namespace {

using Clock = Budget::Clock;

struct PairSeconds {
  double usual;
  double candidate;
};

PairSeconds measure_pair(Subject& subject, const Setting& candidate, Work way, bool candidate_begins) {
  PairSeconds seconds{};
  for (const bool is_candidate : {candidate_begins, !candidate_begins}) {
    (is_candidate ? seconds.candidate : seconds.usual) =
        sample(subject, is_candidate ? candidate : kUsual, way).seconds;
  }
  return seconds;
}

// Gives `turns` the pairs of all its ways.
void take_turns(Turns& turns, Subject& subject, Clock::time_point end) {
  std::vector<std::vector<double>> usual_seconds(turns.ways.size());
  const auto pair_of = [&](std::size_t way, int pair) {
    const PairSeconds seconds = measure_pair(subject, turns.setting, turns.ways[way].work, pair % 2 == 1);
    usual_seconds[way].push_back(seconds.usual);
    return seconds.usual / seconds.candidate;
  };
  const auto ratios = in_turns(turns.ways.size(), pair_of, [&] { return Clock::now() >= end; });
  for (std::size_t i = 0; i < turns.ways.size(); ++i) {
    WayInTurns& way = turns.ways[i];
    way.ratios = ratios[i];
    way.default_gb_per_s = static_cast<double>(subject.sample_bytes(way.work)) / 1e9 / median(usual_seconds[i]);
  }
  turns.better = is_better(ratios);
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
    if (pairs < kLeast || (pairs < kEnoughPairs && !is_over())) return true;
    if (pairs > kEnoughPairs) return pairs < 2 * kEnoughPairs;
    const bool may_gain = std::ranges::any_of(ratios, gains);
    if (pairs < kEnoughPairs) return may_gain;
    return may_gain && !is_better(ratios) && std::ranges::none_of(ratios, loses_clearly);
  };
  for (std::size_t pair = 0; goes_on(pair); ++pair) {
    for (std::size_t way = 0; way < ways; ++way) ratios[way].push_back(pair_of(way, static_cast<int>(pair)));
  }
  return ratios;
}

void decide(Report& report, Subject& subject, const Setting& of_the_disk, Budget::Clock::time_point end) {
  const std::vector<Setting> candidates = candidates_of(report, of_the_disk);
  std::vector<WayInTurns> ways;
  if (!report.disk.cells.empty()) ways.push_back({.work = Work::kDisk});
  if (!report.page_cache.cells.empty()) ways.push_back({.work = Work::kPageCache});
  for (std::size_t i = 0; i < candidates.size() && report.kept_default; ++i) {
    if (i > 1 && Clock::now() > end) break;
    const auto share = (end - Clock::now()) / static_cast<int>(candidates.size() - i);
    report.pick = candidates[i];
    Turns& turns = report.turns.emplace_back(Turns{.setting = report.pick, .ways = ways});
    take_turns(turns, subject, Clock::now() + share);
    report.kept_default = !turns.better;
  }
}

}  // namespace flashpack::bench
