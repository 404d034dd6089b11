#include "bench/support/heat_map.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <set>

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

}  // namespace

std::string heat_map(const std::vector<Cell>& cells, const Setting& pick, bool colours) {
  std::set<std::uint32_t> chunks, depths;
  double fastest = 0;
  for (const Cell& cell : cells) {
    chunks.insert(cell.setting.chunk_bytes);
    depths.insert(cell.setting.queue_depth);
    fastest = std::max(fastest, cell.gb_per_s);
  }
  std::array<char, 64> field{};
  std::string map = "  chunk, depth";
  for (const std::uint32_t depth : depths) {
    std::snprintf(field.data(), field.size(), "%7u ", depth);
    map += field.data();
  }
  map += "\n";
  for (const std::uint32_t chunk : chunks) {
    std::snprintf(field.data(), field.size(), "%10u MiB", chunk >> 20);
    map += field.data();
    for (const std::uint32_t depth : depths) {
      const auto found = std::find_if(cells.begin(), cells.end(), [&](const Cell& cell) {
        return cell.setting.chunk_bytes == chunk && cell.setting.queue_depth == depth;
      });
      const bool chosen = found != cells.end() && found->setting == pick;
      const char mark = chosen ? '*' : found == cells.begin() ? 'd' : ' ';
      map += found == cells.end() ? "        " : text_of(*found, fastest, mark, colours);
    }
    map += "\n";
  }
  std::snprintf(field.data(), field.size(), "  * the fastest for its cost%s\n",
                pick == cells.front().setting ? ", which is the default" : ", d the default");
  map += field.data();
  if (!colours) map += "  # within 3 % of the fastest, + 10 %, : 25 %, . 50 %\n";
  return map;
}

}  // namespace flashpack::bench
