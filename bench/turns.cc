#include "bench/turns.h"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <span>
#include <utility>

#include "bench/program.h"
#include "bench/support/page_cache.h"
#include "bench/support/roofline.h"
#include "bench/support/step_times.h"
#include "flashpack/host_memory.h"

namespace flashpack::bench {

namespace {

void prepare(const Checkpoint& checkpoint, Cache cache) {
  constexpr std::uint64_t kStripeBytes = std::uint64_t{64} << 20;
  // The half is rounded up, so that there is no third stripe at the end.
  const std::uint64_t half_bytes = (std::filesystem::file_size(checkpoint.path()) / 2 / kPageBytes + 1) * kPageBytes;
  switch (cache) {
    case Cache::kCold:
      return drop_from_page_cache(checkpoint.path());
    case Cache::kHalves:
      return warm_every_other(checkpoint.path(), half_bytes);
    case Cache::kStripes:
      return warm_every_other(checkpoint.path(), kStripeBytes);
    case Cache::kResident:
      return warm_page_cache(checkpoint.path());
  }
}

std::string describe(const TransferStats& stats) {
  const auto percent = [&](std::uint64_t bytes) {
    return std::to_string(bytes * 100 / std::max<std::uint64_t>(1, stats.direct_bytes + stats.buffered_bytes)) + "%";
  };
  std::string text = to_string(stats.backend);
  text += ", direct " + percent(stats.direct_bytes) + ", staged " + percent(stats.staged_bytes);
  if (stats.verified_bytes > 0) text += ", verified " + percent(stats.verified_bytes);
  return stats.fallback_reason.empty() ? text : text + ", " + stats.fallback_reason;
}

const Series& roofline(const std::vector<Contender>& all) {
  const Contender* best = nullptr;
  for (const Contender& other : std::span(all).subspan(1)) {
    if (!other.name.empty()) continue;
    if (!best || other.series.gb_per_s() > best->series.gb_per_s()) best = &other;
  }
  return best->series;
}

}  // namespace

Contender EngineWork::contender(std::uint64_t size_bytes, TransferStats& stats) const {
  return {[this, &stats](std::byte* target) { stats = run(engine, target); }, Series(size_bytes)};
}

std::vector<Contender> rooflines(const Setup& setup, Cache cache) {
  const Checkpoint& checkpoint = setup.checkpoint;
  const std::uint64_t size = checkpoint.metadata().payload_bytes;
  const auto load = [&setup, &checkpoint](CachePolicy policy) {
    return [&, policy](std::byte* target) { setup.engine.load(checkpoint.request(target, policy)); };
  };
  const auto raw = [size, &checkpoint](auto* read) {
    return [=, &checkpoint](std::byte* target) { read(checkpoint.path(), std::span(target, size)); };
  };
  switch (cache) {
    case Cache::kCold:
      return {{raw(&read_direct), Series(size)}};
    case Cache::kResident:
      return {{raw(&read_buffered), Series(size)}, {raw(&copy_mapped), Series(size)}};
    case Cache::kHalves:
    case Cache::kStripes:
      break;
  }
  return {{load(CachePolicy::kDirect), Series(size)}, {load(CachePolicy::kBuffered), Series(size)}};
}

Sample run_once(const Setup& setup, const Contender& contender, Cache cache, Memory memory, const Check& check) {
  prepare(setup.checkpoint, cache);
  const auto run_in = [&](std::byte* target) {
    const Sample sample = measure([&] { contender.run(target); });
    if (check) check(target);
    return sample;
  };
  if (memory == Memory::kTouched) return run_in(setup.touched.data());
  const HostMemoryPool& pool = setup.engine.options().memory_pool;
  pool.release_kept();
  const HostMemory fresh(pool, setup.touched.bytes().size());
  return run_in(fresh.data());
}

void take_turns(benchmark::State& state, std::size_t count, const std::function<Sample(std::size_t)>& take_turn) {
  std::size_t round = 0;
  for (auto _ : state) {
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t contender = (round + i) % count;
      const Sample sample = take_turn(contender);
      if (contender == 0) state.SetIterationTime(sample.seconds);
    }
    ++round;
  }
}

void run_rounds(benchmark::State& state, std::vector<Contender>& all, const Turn& turn) {
  take_turns(state, all.size(), [&](std::size_t i) {
    const Sample sample = turn(all[i]);
    all[i].series.add(sample);
    return sample;
  });
}

void report(benchmark::State& state, const std::vector<Contender>& all, const TransferStats& stats) {
  const Series& roof = roofline(all);
  const auto show_series = [&](const std::string& prefix, const Series& series) {
    show(state, prefix, "GB/s", series.rates());
    state.counters[prefix + "cpu_s/GB"] = series.cpu_s_per_gb();
  };
  const auto show_beside_roof = [&](const std::string& prefix, const Series& series) {
    show_series(prefix, series);
    state.counters[prefix + "of_roof"] = series.gb_per_s() / roof.gb_per_s();
  };
  show_beside_roof("", all.front().series);
  show_series("roof_", roof);
  for (const Contender& other : all) {
    if (!other.name.empty()) show_beside_roof(other.name + "_", other.series);
  }
  state.counters["spread"] = all.front().series.spread();
  state.SetLabel(describe(stats));
}

void report_steps(benchmark::State& state, const EngineWork& ours, const Turn& turn) {
  StepTimes times;
  EngineOptions options = ours.engine.options();
  options.trace = &times;
  options.memory_pool.release_kept();  // Memory that is there already would not count.
  const PeakMemory memory;
  Engine engine(options);
  turn({[&](std::byte* target) { ours.run(engine, target); }, Series(1)});
  constexpr double kMib = 1 << 20;
  const StepTimes::Totals totals = times.totals();
  state.counters["peak_MiB"] = static_cast<double>(memory.grown_bytes()) / kMib;
  state.counters["pinned_MiB"] = static_cast<double>(engine.pinned_bytes()) / kMib;
  state.counters["depth"] = totals.depth;
  state.counters["io_share"] = totals.io_share;
  state.counters["copy_share"] = totals.copy_share;
}

void bench_in_turns(benchmark::State& state, const Setup& setup, const EngineWork& ours, std::vector<Contender> others,
                    Cache cache, Memory memory, std::size_t offset) {
  TransferStats stats;
  std::vector<Contender> all = std::move(others);
  all.insert(all.begin(), ours.contender(setup.checkpoint.metadata().payload_bytes, stats));
  touch(setup.touched.bytes());
  run_once(setup, all.front(), cache, memory,
           [&](const std::byte* target) { setup.checkpoint.check(target + offset); });
  const Turn turn = [&](const Contender& contender) { return run_once(setup, contender, cache, memory); };
  run_rounds(state, all, turn);
  report(state, all, stats);
  report_steps(state, ours, turn);
}

}  // namespace flashpack::bench
