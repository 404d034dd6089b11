// Measures loads of a checkpoint to a CUDA device with various options of the engine, and disk, page cache and link
// alone. The figures are medians over the rounds; --benchmark_filter=REGEX picks lines.
#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bench/program.h"
#include "bench/support/checkpoint.h"
#include "bench/support/device_memory.h"
#include "bench/support/link_copies_cuda.h"
#include "bench/support/measure.h"
#include "bench/support/page_cache.h"
#include "bench/support/roofline.h"
#include "engine/ground/host_region.h"
#include "engine/ground/units.h"
#include "flashpack/engine.h"

#if CUDART_VERSION >= 13000
namespace {
bool refuse_batches = false;
}

// The linker leads the engine's batches to the second of these, and gives the runtime's own function the first name.
extern "C" decltype(cudaMemcpyBatchAsync) __real_cudaMemcpyBatchAsync;
extern "C" cudaError_t __wrap_cudaMemcpyBatchAsync(void* const* targets, const void* const* sources,
                                                   const std::size_t* sizes, std::size_t count,
                                                   cudaMemcpyAttributes* attributes, std::size_t* firsts,
                                                   std::size_t attribute_count, cudaStream_t stream) {
  if (refuse_batches) return cudaErrorNotSupported;
  return __real_cudaMemcpyBatchAsync(targets, sources, sizes, count, attributes, firsts, attribute_count, stream);
}
#endif

namespace flashpack::bench {
namespace {

using internal::kMiB;

struct Setup {
  const Checkpoint& checkpoint;
  const DeviceMemory& target;
  internal::HostRegion& host;
};

void prepare(const Checkpoint& checkpoint, CachePolicy cache) {
  cache == CachePolicy::kDirect ? drop_from_page_cache(checkpoint.path()) : warm_page_cache(checkpoint.path());
}

void report(benchmark::State& state, const Series& series) {
  show(state, "", "GB/s", series.rates());
  state.counters["cpu_s/GB"] = series.cpu_s_per_gb();
  state.counters["spread"] = series.spread();
}

void measure_rounds(benchmark::State& state, std::uint64_t size_bytes, const std::function<void()>& before,
                    const std::function<void()>& work) {
  Series series(size_bytes);
  for (auto _ : state) {
    before();
    const Sample sample = measure(work);
    state.SetIterationTime(sample.seconds);
    series.add(sample);
  }
  report(state, series);
}

// Measures the link: page-locked memory goes to the device in copies of `copy_bytes`, dealt out to `streams`.
void bench_link(benchmark::State& state, const Setup& setup, std::uint64_t copy_bytes, unsigned streams) {
  constexpr std::uint64_t kSourceBytes = 256 * kMiB;
  constexpr int kPasses = 8;
  const std::span<std::byte> source(setup.host.data(), kSourceBytes);
  const LockedPages locked(source);
  if (!locked) throw std::runtime_error("the source of the copies cannot be page-locked");
  const LinkCopies copies(setup.target, source, copy_bytes, streams);
  measure_rounds(state, kSourceBytes * kPasses, [] {}, [&] { copies.run(kPasses); });
}

// Measures what it takes to start a copy: copies of so few bytes that the link has time left.
void bench_copy_start(benchmark::State& state, const Setup& setup) {
  constexpr std::uint64_t kCopyBytes = 4 << 10;
  bench_link(state, setup, kCopyBytes, 1);
  state.counters["cpu_us/copy"] = state.counters["cpu_s/GB"] * 1e6 * kCopyBytes / 1e9;
}

void bench_file(benchmark::State& state, const Setup& setup, CachePolicy cache) {
  const std::uint64_t size = setup.checkpoint.metadata().payload_bytes;
  auto* const read = cache == CachePolicy::kDirect ? &read_direct : &read_buffered;
  measure_rounds(
      state, size, [&] { prepare(setup.checkpoint, cache); },
      [&] { read(setup.checkpoint.path(), std::span(setup.host.data(), size)); });
}

/// Extents of a load: one for each tensor, the same with checksums, or extents so small that calls cost more than
/// bytes.
enum class Shape { kTensors, kVerified, kSmallPieces };
constexpr std::uint64_t kSmallPieceBytes = 8 << 10;

// Neighbouring extents swap places in memory, so that the engine cannot join them.
LoadRequest small_pieces(const Setup& setup) {
  const std::uint64_t pairs_bytes =
      setup.checkpoint.metadata().payload_bytes / kSmallPieceBytes / 2 * 2 * kSmallPieceBytes;
  FileExtents file{.path = setup.checkpoint.path()};
  for (std::uint64_t at = 0; at < pairs_bytes; at += kSmallPieceBytes)
    file.extents.push_back({at, kSmallPieceBytes, setup.target.data() + (at ^ kSmallPieceBytes)});
  file.extents.push_back(
      {pairs_bytes, setup.checkpoint.metadata().payload_bytes - pairs_bytes, setup.target.data() + pairs_bytes});
  return {.files = {std::move(file)}};
}

LoadRequest request_for(const Setup& setup, Shape shape) {
  if (shape == Shape::kSmallPieces) return small_pieces(setup);
  LoadRequest request = setup.checkpoint.request(setup.target.data());
  if (shape == Shape::kVerified) {
    const Checkpoint& checkpoint = setup.checkpoint;
    request.files.front().checksums = &checkpoint.metadata().checksums.value();
  }
  return request;
}

void check_on_device(const Setup& setup, Shape shape) {
  const std::uint64_t size = setup.checkpoint.metadata().payload_bytes;
  std::byte* const host = setup.host.data();
  setup.target.copy_to(host);
  if (shape == Shape::kSmallPieces) {
    for (std::uint64_t at = 0; at + 2 * kSmallPieceBytes <= size; at += 2 * kSmallPieceBytes)
      std::swap_ranges(host + at, host + at + kSmallPieceBytes, host + at + kSmallPieceBytes);
  }
  setup.checkpoint.check(host);
}

void bench_load(benchmark::State& state, const Setup& setup, CachePolicy cache, const EngineOptions& options,
                Shape shape = Shape::kTensors) {
  Engine engine(options);
  TransferStats stats;
  measure_rounds(
      state, setup.checkpoint.metadata().payload_bytes,
      [&] {
        setup.target.clear();
        prepare(setup.checkpoint, cache);
      },
      [&] { stats = engine.load(request_for(setup, shape)); });
  check_on_device(setup, shape);
  state.counters["pinned_MiB"] = static_cast<double>(engine.pinned_bytes()) / kMiB;
  std::string label = to_string(stats.backend);
  label += stats.pinned ? ", pinned" : ", not pinned";
  state.SetLabel(stats.fallback_reason.empty() ? label : label + ", " + stats.fallback_reason);
}

void bench_start(benchmark::State& state) {
  for (auto _ : state) {
    Engine engine({.device = {Device::Kind::kCuda, 0}});
    benchmark::DoNotOptimize(engine);
  }
}

// Returns the defaults, and for each option some values below and above its default.
std::vector<EngineOptions> options_to_try() {
  const EngineOptions defaults{.device = {Device::Kind::kCuda, 0}};
  std::vector<EngineOptions> all{defaults};
  const auto with = [&](auto member, auto... values) {
    for (const std::uint64_t value : {std::uint64_t(values)...}) {
      all.push_back(defaults);
      auto& place = all.back().*member;
      place = static_cast<std::remove_reference_t<decltype(place)>>(value);
    }
  };
  with(&EngineOptions::chunk_bytes, 1 * kMiB, 2 * kMiB, 8 * kMiB, 16 * kMiB);
  with(&EngineOptions::queue_depth, 2, 4, 16, 32);
  with(&EngineOptions::staging_bytes, 32 * kMiB, 128 * kMiB, 256 * kMiB, 512 * kMiB);
  with(&EngineOptions::workers, 4, 12, 16);
  return all;
}

std::string name_of(const EngineOptions& options) {
  return "chunk_mib:" + std::to_string(options.chunk_bytes / kMiB) + "/depth:" + std::to_string(options.queue_depth) +
         "/staging_mib:" + std::to_string(options.staging_bytes / kMiB) + "/workers:" + std::to_string(options.workers);
}

void register_all(const Setup& setup, int rounds) {
  const auto add = [rounds](const std::string& name, auto bench) { add_rounds(name, rounds, bench); };
  for (const std::uint64_t copy_mib : {1u, 4u, 16u}) {
    for (const unsigned streams : {1u, 2u, 4u}) {
      add("link/copy_mib:" + std::to_string(copy_mib) + "/streams:" + std::to_string(streams),
          [=, &setup](benchmark::State& state) { bench_link(state, setup, copy_mib * kMiB, streams); });
    }
  }
  add("link/copy_start", [&](benchmark::State& state) { bench_copy_start(state, setup); });
  const std::vector<std::pair<std::string, CachePolicy>> caches{{"cold", CachePolicy::kDirect},
                                                                {"page_cache", CachePolicy::kBuffered}};
  for (const auto& [name, cache] : caches) {
    add("to_host/" + name, [=, &setup](benchmark::State& state) { bench_file(state, setup, cache); });
  }
  for (const auto& [name, cache] : caches) {
    for (const EngineOptions& options : options_to_try()) {
      add("load/" + name + "/" + name_of(options),
          [=, &setup](benchmark::State& state) { bench_load(state, setup, cache, options); });
    }
    const EngineOptions defaults{.device = {Device::Kind::kCuda, 0}};
    add("load/" + name + "/verified",
        [=, &setup](benchmark::State& state) { bench_load(state, setup, cache, defaults, Shape::kVerified); });
    add("load/" + name + "/small_pieces",
        [=, &setup](benchmark::State& state) { bench_load(state, setup, cache, defaults, Shape::kSmallPieces); });
#if CUDART_VERSION >= 13000
    add("load/" + name + "/small_pieces/no_batches", [=, &setup](benchmark::State& state) {
      refuse_batches = true;
      bench_load(state, setup, cache, defaults, Shape::kSmallPieces);
      refuse_batches = false;
    });
#endif
  }
  benchmark::RegisterBenchmark("engine/start", bench_start)->UseRealTime()->Unit(benchmark::kMillisecond);
}

struct Flags {
  double size_gib = 2;
  int rounds = 5;
  std::filesystem::path dir = ".";
};

int run(const Flags& flags) {
  const Checkpoint checkpoint(flags.dir / unique_name("device_bench"),
                              static_cast<std::uint64_t>(flags.size_gib * (1 << 30)), false);
  // Direct reads move whole blocks, so the last one ends past the payload.
  internal::HostRegion host(checkpoint.metadata().payload_bytes + 4096, "tensors");
  touch(host.bytes());
  const DeviceMemory target(0, checkpoint.metadata().payload_bytes);
  const Setup setup{checkpoint, target, host};
  register_all(setup, flags.rounds);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace
}  // namespace flashpack::bench

int main(int argc, char** argv) try {
  flashpack::bench::Flags flags;
  CLI::App app("Loads to CUDA device 0. Also takes the flags of Google Benchmark, such as --benchmark_filter=REGEX.");
  app.add_option("--size_gib", flags.size_gib, "Size of the generated checkpoint, at least 0.5")->capture_default_str();
  app.add_option("--rounds", flags.rounds, "Rounds per line, of which medians are shown")->capture_default_str();
  app.add_option("--dir", flags.dir, "Where the checkpoint is generated, and removed afterwards")
      ->capture_default_str();
  if (const auto status = flashpack::bench::read_command_line(app, argc, argv)) return *status;
  return flashpack::bench::run(flags);
} catch (const std::exception& error) {
  std::cerr << "device_bench: " << error.what() << '\n';
  return 1;
}
