// Finds this machine's queue depth and chunk size: every pair reads the same checkpoint past the page cache, in rounds
// and in random order, and the cheapest of the fastest wins.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <random>
#include <vector>

#include "bench/support/checkpoint.h"
#include "bench/support/huge_memory.h"
#include "bench/support/measure.h"
#include "bench/support/page_cache.h"
#include "bench/support/tuning.h"
#include "flashpack/engine.h"

namespace flashpack::bench {
namespace {

struct Flags {
  double size_gib = 1;
  int rounds = 3;
  std::filesystem::path dir = ".";
  std::vector<std::uint32_t> chunk_mib = {1, 2, 4, 8, 16};
  std::vector<std::uint32_t> queue_depth = {1, 2, 4, 8, 16, 32};
};

struct Candidate {
  EngineOptions options;
  Series series;
};

std::vector<Candidate> candidates(const Flags& flags, std::uint64_t size_bytes) {
  std::vector<Candidate> all;
  for (const std::uint32_t chunk_mib : flags.chunk_mib) {
    for (const std::uint32_t queue_depth : flags.queue_depth) {
      EngineOptions options;
      options.chunk_bytes = chunk_mib << 20;
      options.queue_depth = queue_depth;
      // Enough that staging never limits what is in flight.
      const std::uint64_t in_flight_bytes = std::uint64_t{options.chunk_bytes} * queue_depth;
      options.staging_bytes =
          std::max(options.staging_bytes, std::max(in_flight_bytes, std::uint64_t{2} * options.chunk_bytes));
      all.push_back({options, Series(size_bytes)});
    }
  }
  return all;
}

void run_rounds(std::vector<Candidate>& all, const Checkpoint& checkpoint, int rounds) {
  HugeMemory memory(checkpoint.metadata().payload_bytes + 4096);
  memory.touch();
  drop_from_page_cache(checkpoint.path());
  std::mt19937 random(std::random_device{}());
  std::vector<std::size_t> order(all.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  for (int round = 0; round < rounds; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    for (const std::size_t i : order) {
      Engine engine(all[i].options);
      const LoadRequest whole = checkpoint.request(memory.data(), CachePolicy::kDirect);
      // The engine takes its staging memory at its first load, once in its life; that is not what is compared here.
      LoadRequest first_tensor = whole;
      first_tensor.files.front().extents.resize(1);
      engine.load(first_tensor);
      all[i].series.add(measure([&] { engine.load(whole); }));
    }
    std::fprintf(stderr, "round %d of %d\n", round + 1, rounds);
  }
}

void print_table(const std::vector<Candidate>& all, const Flags& flags, const Cell& best) {
  std::printf("median GB/s (ms of CPU per GB), * the pair to use\n\n%10s", "chunk \\ QD");
  for (const std::uint32_t depth : flags.queue_depth) std::printf("%14u", depth);
  for (const Candidate& candidate : all) {
    const EngineOptions& options = candidate.options;
    if (options.queue_depth == flags.queue_depth.front()) std::printf("\n%6u MiB", options.chunk_bytes >> 20);
    const bool chosen = options.chunk_bytes == best.chunk_bytes && options.queue_depth == best.queue_depth;
    std::printf("%7.2f (%3.0f)%c", candidate.series.gb_per_s(), candidate.series.cpu_s_per_gb() * 1e3,
                chosen ? '*' : ' ');
  }
  std::printf("\n\nbest pair: EngineOptions{.chunk_bytes = %u << 20, .queue_depth = %u}   %.2f GB/s, spread %.0f %%\n",
              best.chunk_bytes >> 20, best.queue_depth, best.gb_per_s, best.spread * 100);
}

void run(const Flags& flags) {
  const auto size_bytes = static_cast<std::uint64_t>(flags.size_gib * (1 << 30));
  const Checkpoint checkpoint(flags.dir / "flashpack_tune.flashpack", size_bytes, false);
  auto all = candidates(flags, checkpoint.metadata().payload_bytes);
  run_rounds(all, checkpoint, flags.rounds);
  std::vector<Cell> cells;
  for (const auto& [options, series] : all) {
    cells.push_back(
        {options.chunk_bytes, options.queue_depth, series.gb_per_s(), series.cpu_s_per_gb(), series.spread()});
  }
  print_table(all, flags, choose(cells));
}

}  // namespace
}  // namespace flashpack::bench

int main(int argc, char** argv) try {
  flashpack::bench::Flags flags;
  CLI::App app("Measures every pair of chunk size and queue depth on this disk and names the best one.");
  app.add_option("--dir", flags.dir, "A directory on the disk to tune for")->capture_default_str();
  app.add_option("--size_gib", flags.size_gib, "Size of the generated checkpoint")->capture_default_str();
  app.add_option("--rounds", flags.rounds, "Times that each pair is measured")->capture_default_str();
  app.add_option("--chunk_mib", flags.chunk_mib, "Chunk sizes to try, powers of two")->capture_default_str();
  app.add_option("--queue_depth", flags.queue_depth, "Queue depths to try")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  flashpack::bench::run(flags);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "flashpack_tune: %s\n", error.what());
  return 1;
}
