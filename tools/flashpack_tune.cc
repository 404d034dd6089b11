// Finds this machine's queue depth and chunk size: every pair reads the same checkpoint past the page cache, in rounds
// and in random order, and the cheapest of the fastest wins. Where the file stays in the page cache, only chunk sizes
// are compared, because the queue depth is for disks.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "bench/support/checkpoint.h"
#include "bench/support/measure.h"
#include "bench/support/page_cache.h"
#include "bench/support/tuning.h"
#include "engine/ground/host_region.h"
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
  std::string fallback_reason;
};

std::vector<Candidate> candidates(const Flags& flags, std::uint64_t size_bytes) {
  std::vector<Candidate> all;
  for (const std::uint32_t chunk_mib : flags.chunk_mib) {
    for (const std::uint32_t queue_depth : flags.queue_depth) {
      EngineOptions options;
      options.chunk_bytes = chunk_mib << 20;
      options.queue_depth = queue_depth;
      // Staging is large enough never to limit the reads in flight.
      const std::uint64_t in_flight_bytes = std::uint64_t{options.chunk_bytes} * queue_depth;
      options.staging_bytes =
          std::max({std::uint64_t{64} << 20, in_flight_bytes, std::uint64_t{2} * options.chunk_bytes});
      all.push_back({options, Series(size_bytes), ""});
    }
  }
  return all;
}

void run_rounds(std::vector<Candidate>& all, const Checkpoint& checkpoint, CachePolicy cache, int rounds) {
  internal::HostRegion memory(checkpoint.metadata().payload_bytes + 4096, "tensors");
  touch(memory.bytes());
  std::mt19937 random(std::random_device{}());
  std::vector<std::size_t> order(all.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  for (int round = 0; round < rounds; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    for (const std::size_t i : order) {
      Engine engine(all[i].options);
      const LoadRequest whole = checkpoint.request(memory.data(), cache);
      // The engine takes its staging memory at its first load, which is not to be measured.
      LoadRequest first_tensor = whole;
      first_tensor.files.front().extents.resize(1);
      engine.load(first_tensor);
      all[i].series.add(measure([&] { all[i].fallback_reason = engine.load(whole).fallback_reason; }));
    }
    std::fprintf(stderr, "round %d of %d\n", round + 1, rounds);
  }
}

void print_table(const std::vector<Candidate>& all, const std::vector<Cell>& cells, const Cell& best) {
  std::printf("\n%10s", "chunk \\ QD");
  for (const Cell& cell : cells) {
    if (cell.chunk_bytes == cells.front().chunk_bytes) std::printf("%14u", cell.queue_depth);
  }
  for (std::size_t i = 0; i < cells.size(); ++i) {
    const Cell& cell = cells[i];
    if (i == 0 || cell.chunk_bytes != cells[i - 1].chunk_bytes) std::printf("\n%6u MiB", cell.chunk_bytes >> 20);
    std::printf("%7.2f (%3.0f)%c", cell.gb_per_s, cell.cpu_s_per_gb * 1e3, &cell == &best ? '*' : ' ');
  }
  const Cell& first = fastest(cells);
  const double spread = all[static_cast<std::size_t>(&first - cells.data())].series.spread();
  std::printf(
      "\n\nmedian GB/s (ms of CPU per GB), * what to use: of those within %.0f %% of the fastest, what costs the "
      "least\n"
      "CPU, in steps of %.0f ms, and of equals what has the fewest bytes in flight\n",
      kTolerance * 100, kCpuStepSPerGb * 1e3);
  if (spread > kTolerance) {
    std::printf("The fastest one's own samples lie %.0f %% around their median: more --rounds would be surer.\n",
                spread * 100);
  }
}

void print_best(const Cell& best, const Cell& first, CachePolicy cache) {
  std::printf("\nbest: EngineOptions{.chunk_bytes = %u << 20", best.chunk_bytes >> 20);
  if (cache == CachePolicy::kDirect) std::printf(", .queue_depth = %u", best.queue_depth);
  std::printf("}   %.2f GB/s, %.1f %% below the fastest\n", best.gb_per_s, (1 - best.gb_per_s / first.gb_per_s) * 100);
}

void run(Flags flags) {
  const auto size_bytes = static_cast<std::uint64_t>(flags.size_gib * (1 << 30));
  const Checkpoint checkpoint(flags.dir / "flashpack_tune.flashpack", size_bytes, false);
  const CachePolicy cache = try_drop_from_page_cache(checkpoint.path()) ? CachePolicy::kDirect : CachePolicy::kBuffered;
  if (cache == CachePolicy::kBuffered) {
    std::printf(
        "%s stays in the page cache, as on tmpfs: reads from a disk cannot be measured here, and so no queue depth.\n"
        "What is measured are reads from the page cache.\n",
        checkpoint.path().c_str());
    flags.queue_depth = {EngineOptions().queue_depth};
  }
  auto all = candidates(flags, checkpoint.metadata().payload_bytes);
  run_rounds(all, checkpoint, cache, flags.rounds);
  std::vector<Cell> cells;
  for (const Candidate& candidate : all) {
    const auto& [options, series, fallback_reason] = candidate;
    cells.push_back({options.chunk_bytes, options.queue_depth, series.gb_per_s(), series.cpu_s_per_gb()});
  }
  const Cell& best = choose(cells);
  print_table(all, cells, best);
  print_best(best, fastest(cells), cache);
  const std::string& reason = all[static_cast<std::size_t>(&best - cells.data())].fallback_reason;
  if (!reason.empty()) std::printf("It did without: %s\n", reason.c_str());
}

}  // namespace
}  // namespace flashpack::bench

int main(int argc, char** argv) try {
  flashpack::bench::Flags flags;
  CLI::App app("Measures every pair of chunk size and queue depth on this disk and names the best one.");
  app.add_option("--dir", flags.dir, "A directory on the disk to tune for")->capture_default_str();
  app.add_option("--size_gib", flags.size_gib, "Size of the generated checkpoint")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--rounds", flags.rounds, "Times that each pair is measured")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--chunk_mib", flags.chunk_mib, "Chunk sizes to try, powers of two")->capture_default_str();
  app.add_option("--queue_depth", flags.queue_depth, "Queue depths to try")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  flashpack::bench::run(std::move(flags));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "flashpack_tune: %s\n", error.what());
  return 1;
}
