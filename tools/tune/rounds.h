/// Which settings are measured in the next round of a search, and when a search ends. It is pure.
#pragma once

#include <functional>
#include <vector>

#include "tools/tune/cell.h"

namespace flashpack::bench {

/// Samples of the default and of the fastest setting after which a search ends.
inline constexpr int kEnoughSamples = 5;

/// The settings that lie beside another one.
using Neighbours = std::function<std::vector<Setting>(const Setting&)>;

/// The settings to measure in the next round: the default, the fastest three, and what lies beside the fastest and has
/// not been measured; empty when another round would not change the choice. Without `neighbours` nothing lies beside.
/// Requires: the default is first.
std::vector<Setting> next_round(const std::vector<Cell>& cells, const Neighbours& neighbours);

}  // namespace flashpack::bench
