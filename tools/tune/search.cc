#include "tools/tune/search.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <random>
#include <utility>

#include "tools/tune/choice.h"
#include "tools/tune/report.h"

namespace flashpack::bench {

namespace {

struct Search {
  std::vector<Cell> cells;
  std::vector<Series> series;
};

// On a terminal the table is drawn anew after each round, else there is a line.
void show(const char* what, const std::vector<Cell>& cells, const Budget& budget, bool first) {
  static std::size_t lines = 0;
  const Cell& best = choose(cells);
  if (::isatty(STDERR_FILENO) != 0) {
    if (!first && lines > 0) std::fprintf(stderr, "\033[%zuF\033[J", lines);
    for (const Cell& cell : cells) {
      std::fprintf(stderr, "%c %-44s %7.2f GB/s %5.0f ms CPU/GB %3d samples\n", &cell == &best ? '*' : ' ',
                   text_of(cell.setting).c_str(), cell.gb_per_s, cell.cpu_s_per_gb * 1e3, cell.samples);
    }
    lines = cells.size() + 1;
  }
  std::fprintf(stderr, "%s: %.0f s of %.0f s, best %s %.2f GB/s, default %.2f GB/s\n", what, budget.spent_s(),
               budget.seconds, text_of(best.setting).c_str(), best.gb_per_s, cells.front().gb_per_s);
}

void add_sample(Search& search, Subject& subject, const Setting& setting, Work work) {
  auto found =
      std::find_if(search.cells.begin(), search.cells.end(), [&](const Cell& cell) { return cell.setting == setting; });
  if (found == search.cells.end()) {
    found = search.cells.insert(search.cells.end(), {.setting = setting});
    search.series.emplace_back(subject.sample_bytes(work));
  }
  Series& series = search.series[static_cast<std::size_t>(found - search.cells.begin())];
  series.add(sample(subject, setting, work));
  ++found->samples;
  found->gb_per_s = series.gb_per_s();
  found->cpu_s_per_gb = series.cpu_s_per_gb();
}

bool has_backend(const std::vector<Cell>& cells, Backend backend) {
  return std::ranges::any_of(cells, [&](const Cell& cell) { return cell.setting.backend == backend; });
}

}  // namespace

std::vector<Cell> search(Subject& subject, std::vector<Setting> round, const Neighbours& neighbours, Work work,
                         const Budget& budget, double share) {
  Search result;
  // std::random_device would need a newer glibc than the wheels.
  std::mt19937 random(static_cast<std::mt19937::result_type>(budget.begin.time_since_epoch().count()));
  const std::array<const char*, 3> names{"disk", "page cache", "writes"};
  const double until_s = share * budget.seconds;
  for (bool first = true; !round.empty(); first = false, round = next_round(result.cells, neighbours)) {
    // The default stays in front, because it is what others are compared with.
    std::shuffle(round.begin() + 1, round.end(), random);
    for (const Setting& setting : round) {
      if (has_backend(result.cells, setting.backend) && budget.spent_s() > until_s) continue;
      add_sample(result, subject, setting, work);
    }
    show(names[static_cast<std::size_t>(work)], result.cells, budget, first);
    if (budget.spent_s() > until_s) break;
  }
  return std::move(result.cells);
}

}  // namespace flashpack::bench
