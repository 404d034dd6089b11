#include "tools/tune/decide.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "bench/support/measure.h"
#include "tools/tune/choice.h"

namespace flashpack::bench {

namespace {

using Clock = Budget::Clock;

// The speeds of the pick relative to the default, from pairs of samples in turns. A pick that gains so far gets all
// of the pairs, also when the time is over, because where pairs differ by chance, few of them seldom show a gain beyond
// doubt.
std::vector<double> ratios_of(Subject& subject, const Setting& pick, Work work, Clock::time_point end) {
  constexpr int kLeast = 7;
  constexpr int kMost = 16;  // Two of so many may lose anything.
  std::vector<double> ratios;
  const auto gains = [&] { return median(ratios) > 1 + kTolerance; };
  for (int pair = 0; pair < kMost && (pair < kLeast || Clock::now() < end || gains()); ++pair) {
    std::array<double, 2> seconds{};
    for (const int turn : {pair % 2, 1 - pair % 2}) {
      seconds[static_cast<std::size_t>(turn)] = sample(subject, turn == 0 ? kUsual : pick, work).seconds;
    }
    ratios.push_back(seconds[0] / seconds[1]);
  }
  return ratios;
}

// The best one for the disk with the engine's own backend.
Setting best_of_usual_backend(std::vector<Cell> cells) {
  const auto other = [](const Cell& cell) { return cell.setting.backend != kUsual.backend; };
  cells.erase(std::remove_if(cells.begin() + 1, cells.end(), other), cells.end());
  return choose(cells).setting;
}

}  // namespace

std::vector<Setting> candidates_of(const Report& report, const Setting& of_the_disk) {
  std::vector<Cell> cells = report.page_cache.cells;
  const auto other = [&](const Cell& cell) {
    return cell.setting.chunk_bytes != of_the_disk.chunk_bytes || cell.setting.queue_depth != of_the_disk.queue_depth;
  };
  cells.erase(std::remove_if(cells.begin() + 1, cells.end(), other), cells.end());
  std::vector<Setting> candidates;
  std::vector<Setting> wanted{report.pick, choose(cells).setting, of_the_disk};
  if (of_the_disk.backend != kUsual.backend) wanted.push_back(best_of_usual_backend(report.disk.cells));
  for (const Setting& each : wanted) {
    if (each != kUsual) add_new(candidates, each);
  }
  return candidates;
}

void decide(Report& report, Subject& subject, const Setting& of_the_disk, Budget::Clock::time_point end) {
  const std::vector<Setting> candidates = candidates_of(report, of_the_disk);
  for (std::size_t i = 0; i < candidates.size() && report.kept_default; ++i) {
    if (i > 1 && Clock::now() > end) break;
    const auto share = (end - Clock::now()) / static_cast<int>(2 * (candidates.size() - i));
    report.pick = candidates[i];
    std::vector<std::vector<double>> ratios;
    if (!report.disk.cells.empty())
      ratios.push_back(ratios_of(subject, report.pick, Work::kDisk, Clock::now() + share));
    ratios.push_back(ratios_of(subject, report.pick, Work::kPageCache, Clock::now() + share));
    report.gains.clear();
    for (const std::vector<double>& pairs : ratios) report.gains.push_back(median(pairs) - 1);
    report.kept_default = !is_better(std::move(ratios));
  }
}

}  // namespace flashpack::bench
