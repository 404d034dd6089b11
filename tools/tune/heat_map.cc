#include "tools/tune/heat_map.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <set>
#include <tuple>

#include "tools/tune/choice.h"

namespace flashpack::bench {

namespace {

// How cells are shown that are within `loss` of the fastest. The colours are those of 256, and all bear black text.
struct Shade {
  double loss;
  char character;
  int colour;
};
constexpr std::array<Shade, 5> kShades = {
    {{kTolerance, '#', 120}, {0.1, '+', 156}, {0.25, ':', 187}, {0.5, '.', 223}, {1, ' ', 216}}};
constexpr int kBlack = 16;

const Shade& shade_of(double gb_per_s, double fastest) {
  const double loss = 1 - gb_per_s / fastest;
  return *std::find_if(kShades.begin(), kShades.end() - 1, [&](const Shade& shade) { return loss <= shade.loss; });
}

std::string text_of(const Cell& cell, double fastest, char mark, bool colours) {
  const Shade& shade = shade_of(cell.gb_per_s, fastest);
  std::array<char, 64> text{};
  if (colours) {
    std::snprintf(text.data(), text.size(), "\033[48;5;%dm\033[38;5;%dm %6.2f%c\033[0m", shade.colour, kBlack,
                  cell.gb_per_s, mark);
  } else {
    std::snprintf(text.data(), text.size(), " %c%5.2f%c", shade.character, cell.gb_per_s, mark);
  }
  return text.data();
}

std::uint64_t column_of(const Cell& cell, Columns columns) {
  return columns == Columns::kStaging ? cell.setting.staging_bytes >> 20 : cell.setting.queue_depth;
}

// The cell to show in a place; null if there is none.
const Cell* shown(const std::vector<Cell>& cells, const Setting& pick, Columns columns, std::uint32_t chunk_bytes,
                  std::uint64_t column) {
  const auto rank = [&](const Cell& cell) {
    return std::tuple(cell.setting == pick, &cell == &cells.front(), cell.gb_per_s);
  };
  const Cell* best = nullptr;
  for (const Cell& cell : cells) {
    const bool is_here = cell.setting.chunk_bytes == chunk_bytes && column_of(cell, columns) == column;
    if (is_here && (best == nullptr || rank(cell) > rank(*best))) best = &cell;
  }
  return best;
}

}  // namespace

std::string heat_map(const std::vector<Cell>& cells, const Setting& pick, bool colours, Columns columns) {
  const bool by_depth = columns == Columns::kQueueDepth;
  std::set<std::uint32_t> chunks;
  std::set<std::uint64_t> numbers;
  double fastest = 0;
  for (const Cell& cell : cells) {
    chunks.insert(cell.setting.chunk_bytes);
    numbers.insert(column_of(cell, columns));
    fastest = std::max(fastest, cell.gb_per_s);
  }
  std::array<char, 64> field{};
  std::string map = by_depth ? "  chunk, depth" : "chunk, staging";
  for (const std::uint64_t number : numbers) {
    std::snprintf(field.data(), field.size(), "%7llu ", static_cast<unsigned long long>(number));
    map += field.data();
  }
  map += "\n";
  for (const std::uint32_t chunk : chunks) {
    std::snprintf(field.data(), field.size(), "%10u MiB", chunk >> 20);
    map += field.data();
    for (const std::uint64_t number : numbers) {
      const Cell* const cell = shown(cells, pick, columns, chunk, number);
      const char mark = cell != nullptr && cell->setting == pick ? '*' : cell == &cells.front() ? 'd' : ' ';
      map += cell == nullptr ? "        " : text_of(*cell, fastest, mark, colours);
    }
    map += "\n";
  }
  map += std::string("  * the fastest for its cost") + (pick == cells.front().setting ? ", which is " : ", d ") +
         (by_depth ? "the default\n" : "what the disk asked for\n");
  if (!colours) map += "  # within 3 % of the fastest, + 10 %, : 25 %, . 50 %\n";
  return map;
}

}  // namespace flashpack::bench
