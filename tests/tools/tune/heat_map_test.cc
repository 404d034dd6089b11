#include "tools/tune/heat_map.h"

#include <gtest/gtest.h>

#include <string>

#include "tests/support/units.h"

namespace flashpack::bench {
namespace {

using testing::kMiB;

Cell cell(std::uint32_t chunk_mib, std::uint32_t depth, double gb_per_s) {
  return {.setting = {chunk_mib * kMiB, depth, 0}, .samples = 1, .gb_per_s = gb_per_s};
}

const std::vector<Cell> kCells = {cell(4, 8, 1.95), cell(16, 8, 2.0), cell(1, 2, 0.9), cell(4, 2, 1.5),
                                  cell(1, 32, 1.7)};

TEST(HeatMap, ChunksAreLinesDepthsAreColumnsAndBothAreSortedByNumber) {
  EXPECT_EQ(heat_map(kCells, kCells[1].setting, false),
            "  chunk, depth      2       8      32 \n"
            "         1 MiB   0.90          : 1.70 \n"
            "         4 MiB : 1.50  # 1.95d        \n"
            "        16 MiB         # 2.00*        \n"
            "  * the fastest for its cost, d the default\n"
            "  # within 3 % of the fastest, + 10 %, : 25 %, . 50 %\n");
}

TEST(HeatMap, ADefaultThatIsThePickIsMarkedOnceAndSaid) {
  const std::string map = heat_map(kCells, kCells[0].setting, false);
  EXPECT_NE(map.find("1.95*"), std::string::npos) << map;
  EXPECT_EQ(map.find("2.00*"), std::string::npos) << map;
  EXPECT_NE(map.find("which is the default"), std::string::npos) << map;
}

TEST(HeatMap, ColumnsOfStagingMemoryShowThePickTheFirstElseTheFastestOfSeveralInAPlace) {
  const auto staged = [](std::uint32_t chunk_mib, std::uint64_t staging_mib, std::uint32_t workers, double gb_per_s) {
    Cell made = cell(chunk_mib, 8, gb_per_s);
    made.setting.workers = workers;
    made.setting.staging_bytes = staging_mib * kMiB;
    return made;
  };
  const std::vector<Cell> cells{staged(4, 96, 0, 35), staged(4, 96, 8, 36), staged(1, 24, 0, 40), staged(1, 24, 4, 43),
                                staged(1, 24, 8, 44), staged(2, 24, 0, 20), staged(2, 24, 1, 30)};
  EXPECT_EQ(heat_map(cells, cells[3].setting, false, Columns::kStaging),
            "chunk, staging     24      96 \n"
            "         1 MiB #43.00*        \n"
            "         2 MiB .30.00         \n"
            "         4 MiB         :35.00d\n"
            "  * the fastest for its cost, d what the disk asked for\n"
            "  # within 3 % of the fastest, + 10 %, : 25 %, . 50 %\n");
}

TEST(HeatMap, ColoursEndWithTheirCellAndPlainTextHasNone) {
  const std::string map = heat_map(kCells, kCells[1].setting, true);
  EXPECT_NE(map.find("\033[48;5;120m\033[38;5;16m   2.00*\033[0m"), std::string::npos) << map;
  EXPECT_EQ(heat_map(kCells, kCells[1].setting, false).find('\033'), std::string::npos);
}

TEST(HeatMap, ADiskOnWhichNothingCouldBeReadHasNoBrightCell) {
  EXPECT_NE(heat_map({cell(4, 8, 0)}, kCells[0].setting, false).find("0.00*"), std::string::npos);
}

}  // namespace
}  // namespace flashpack::bench
