#include <stdexcept>

#include "bench/program.h"
#include "bench/rows.h"
#include "bench/support/instant_pipeline.h"

namespace flashpack::bench {
namespace {

// Measures loads of the whole payload as one extent to `offset` in the touched memory. No byte moves.
void bench_instant(benchmark::State& state, const Setup& setup, CachePolicy cache, std::size_t offset) {
  constexpr int kLoads = 8;
  const std::uint64_t size = setup.checkpoint.metadata().payload_bytes;
  touch(setup.touched.bytes());
  InstantPipeline pipeline;
  Series series(kLoads * size);
  std::uint64_t chunks = 0;
  const double before = pipeline.driver_cpu_seconds();
  for (auto _ : state) {
    const Sample sample = measure([&] {
      for (int i = 0; i < kLoads; ++i) {
        const FileExtents file{setup.checkpoint.path(), {{0, size, setup.touched.data() + offset}}};
        const TransferStats stats = pipeline.load({.files = {file}, .cache = cache});
        if (stats.direct_bytes + stats.buffered_bytes < size) throw std::runtime_error("the load is not whole");
        chunks += stats.operations;
      }
    });
    series.add(sample);
    state.SetIterationTime(sample.seconds);
  }
  state.counters["driver_us/chunk"] = (pipeline.driver_cpu_seconds() - before) * 1e6 / static_cast<double>(chunks);
  show(state, "", "GB/s", series.rates());
}

}  // namespace

void register_pipeline_rows(const Setup& setup, int rounds) {
  const auto add = [&](const char* name, CachePolicy cache, std::size_t offset) {
    add_rounds(name, rounds, [=, &setup](benchmark::State& state) { bench_instant(state, setup, cache, offset); });
  };
  add("pipeline/in_place", CachePolicy::kDirect, 0);
  add("pipeline/in_place_or_cached", CachePolicy::kAuto, 0);
  add("pipeline/through_slots", CachePolicy::kDirect, kOddBytes);
  add("pipeline/page_cache", CachePolicy::kBuffered, 0);
}

}  // namespace flashpack::bench
