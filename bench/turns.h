/// Shared by the rows of engine_bench: contenders that move the same bytes take turns.
#pragma once

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bench/support/checkpoint.h"
#include "bench/support/measure.h"
#include "engine/ground/host_region.h"
#include "engine/ground/rounding.h"
#include "engine/ground/units.h"
#include "flashpack/engine.h"

namespace flashpack::bench {

/// The state says which part of the file is in the page cache before a load.
enum class Cache { kCold, kHalves, kStripes, kResident };

enum class Memory { kTouched, kFresh };

/// Whether each load opens the file, or all are given one that is open.
enum class Open { kByLoad, kBefore };

/// A target that is moved by this many bytes cannot be read in place.
inline constexpr std::size_t kOddBytes = 64;

using internal::kKiB;
using internal::kPageBytes;

/// Reads in flight where single reads are measured, of the engine and of what stands beside it.
inline constexpr unsigned kDepth = 32;

struct Setup {
  const Checkpoint& checkpoint;
  Engine& engine;
  internal::HostRegion& touched;  ///< As large as the payload, and a page and kOddBytes more.
};

/// One way to load or store the file. A line is about the first contender; contenders with a name are shown, too; the
/// fastest of the others is the roofline.
struct Contender {
  std::function<void(std::byte*)> run;
  Series series;
  std::string name = {};
};

/// The engine's way to load or store the file, with this engine or another one of the same options.
struct EngineWork {
  Engine& engine;
  std::function<TransferStats(Engine&, std::byte*)> run;

  /// A contender that runs it and keeps its figures in `stats`. Borrows both until it has run.
  Contender contender(std::uint64_t size_bytes, TransferStats& stats) const;
};

/// Prepares and measures one turn of a contender.
using Turn = std::function<Sample(const Contender&)>;

/// The least code that loads the whole file, in each way that suits that state of the page cache. For a file that is
/// half in the page cache these are loads of the engine, all past it and all through it.
std::vector<Contender> rooflines(const Setup& setup, Cache cache);

/// Looks at what a contender has loaded to the memory that it was given. Throws if that is wrong.
using Check = std::function<void(const std::byte*)>;

/// Runs the contender with memory of that kind. `check` looks at it after the clock has stopped.
Sample run_once(const Setup& setup, const Contender& contender, Cache cache, Memory memory, const Check& check = {});

/// Takes one turn of each of `count` contenders per iteration: `take_turn` prepares and measures that of the contender
/// with its index. Each round begins with another one, so that none always profits from its place. The iteration's time
/// is that of the first contender.
void take_turns(benchmark::State& state, std::size_t count, const std::function<Sample(std::size_t)>& take_turn);

/// The same for `all`, whose series get the samples.
void run_rounds(benchmark::State& state, std::vector<Contender>& all, const Turn& turn);

void report(benchmark::State& state, const std::vector<Contender>& all, const TransferStats& stats);

/// Takes one more turn of `ours`, which is not timed, with an engine that has a trace, and shows what it tells: memory,
/// depth, and the shares of the time in which the file and copies were busy.
void report_steps(benchmark::State& state, const EngineWork& ours, const Turn& turn);

/// Checks the bytes that `ours` loads to `offset` in memory of that kind, then measures it and the others in turns.
void bench_in_turns(benchmark::State& state, const Setup& setup, const EngineWork& ours, std::vector<Contender> others,
                    Cache cache, Memory memory = Memory::kTouched, std::size_t offset = 0);

}  // namespace flashpack::bench
