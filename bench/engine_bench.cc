// Measures loads and stores of a checkpoint on the host, and what the engine itself costs. The engine takes turns with
// the least code that moves the same bytes (the roofline), in the same state of the page cache. Each state of cache and
// memory has a line of medians over the rounds.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <exception>
#include <filesystem>
#include <iostream>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bench/program.h"
#include "bench/rows.h"
#include "bench/support/checkpoint.h"
#include "bench/support/measure.h"
#include "bench/support/open_file.h"
#include "bench/support/roofline.h"
#include "bench/turns.h"
#include "engine/ground/host_region.h"
#include "flashpack/engine.h"
#include "flashpack/file_writer.h"

namespace flashpack::bench {
namespace {

// Loads the whole checkpoint to `offset` in the memory.
auto loads_of(const Checkpoint& checkpoint, std::size_t offset = 0) {
  return [&checkpoint, offset](Engine& engine, std::byte* target) {
    return engine.load(checkpoint.request(target + offset));
  };
}

void bench_load(benchmark::State& state, const Setup& setup, Cache cache, Memory memory) {
  bench_in_turns(state, setup, {setup.engine, loads_of(setup.checkpoint)}, rooflines(setup, cache), cache, memory);
}

// Measures the workers, which read where io_uring is refused.
void bench_workers(benchmark::State& state, const Setup& setup) {
  Engine workers({.backend = Backend::kWorkers});
  Engine ring({.backend = Backend::kIoUring});
  const Series none(setup.checkpoint.metadata().payload_bytes);
  const auto load = loads_of(setup.checkpoint);
  bench_in_turns(state, setup, {workers, load}, {{[&](std::byte* target) { load(ring, target); }, none}}, Cache::kCold);
}

// Measures loads to targets that do not agree with the file modulo the page, so that every byte goes through a slot.
void bench_through_slots(benchmark::State& state, const Setup& setup) {
  const Series none(setup.checkpoint.metadata().payload_bytes);
  const auto in_place = [&](std::byte* target) { setup.engine.load(setup.checkpoint.request(target)); };
  const EngineWork beside{setup.engine, loads_of(setup.checkpoint, kOddBytes)};
  bench_in_turns(state, setup, beside, {{in_place, none}}, Cache::kCold, Memory::kTouched, kOddBytes);
}

void bench_verified(benchmark::State& state, const Setup& setup, Cache cache) {
  const Checkpoint& checkpoint = setup.checkpoint;
  const Series none(checkpoint.metadata().payload_bytes);
  const auto verified = [&](Engine& engine, std::byte* target) {
    LoadRequest request = checkpoint.request(target);
    request.files.front().checksums = &checkpoint.metadata().checksums.value();
    return engine.load(std::move(request));
  };
  const auto plain = [&](std::byte* target) { setup.engine.load(checkpoint.request(target)); };
  bench_in_turns(state, setup, {setup.engine, verified}, {{plain, none}}, cache);
}

// Measures what it costs to be told when each of 1,000 extents has landed, and how soon the first can be used.
void bench_reported(benchmark::State& state, const Setup& setup, Cache cache) {
  using Clock = std::chrono::steady_clock;
  struct Counter final : Completion {
    void landed(std::size_t, std::size_t) noexcept override {
      if (extents++ == 0) first = Clock::now();
    }
    void done(Transfer&) noexcept override {}
    std::uint64_t extents = 0;
    Clock::time_point first;
  };
  constexpr std::uint64_t kExtents = 1000;
  const std::uint64_t size = setup.checkpoint.metadata().payload_bytes;
  const auto begin_of = [size](std::uint64_t i) {
    return i == kExtents ? size : size / kExtents * i / kPageBytes * kPageBytes;
  };
  std::vector<double> first_of_load;
  const auto load = [&](bool report) {
    return [&, report](Engine& engine, std::byte* target) {
      const auto began = Clock::now();
      FileExtents file{.path = setup.checkpoint.path()};
      for (std::uint64_t i = 0; i < kExtents; ++i)
        file.extents.push_back({begin_of(i), begin_of(i + 1) - begin_of(i), target + begin_of(i)});
      Counter counter;
      const auto stats = engine.start_load({.files = {std::move(file)}, .report_extents = report}, &counter).wait();
      if (counter.extents != (report ? kExtents : 0)) throw std::runtime_error("reported extents are not all there");
      if (report)
        first_of_load.push_back((counter.first - began) / std::chrono::duration<double>(Clock::now() - began));
      return stats;
    };
  };
  const auto unreported = [&, quiet = load(false)](std::byte* target) { quiet(setup.engine, target); };
  bench_in_turns(state, setup, {setup.engine, load(true)}, {{unreported, Series(size)}}, cache);
  state.counters["first_of_load"] = median(first_of_load);
}

// Measures small loads of cached bytes one after the other, which shows the cost of a load as such.
void bench_small(benchmark::State& state, const Setup& setup, std::uint64_t load_bytes, Open open) {
  constexpr std::uint64_t kLoads = 1000;
  const std::filesystem::path& path = setup.checkpoint.path();
  const std::uint64_t step_bytes = setup.checkpoint.metadata().payload_bytes / kLoads;
  if (step_bytes < load_bytes) throw std::runtime_error("so many loads need a larger file");
  TransferStats stats;
  const auto one_by_one = [&](const auto& load) {
    return [&, load](std::byte* target) {
      for (std::uint64_t i = 0; i < kLoads; ++i) load(i * step_bytes, target + i * load_bytes);
    };
  };
  const FileHandle handle = open == Open::kBefore ? setup.engine.open(path) : FileHandle();
  const OpenFile opened(path, O_RDONLY);
  const auto ours = [&](std::uint64_t offset, std::byte* target) {
    FileExtents file{.extents = {{offset, load_bytes, target}}, .handle = handle};
    if (open == Open::kByLoad) file.path = path;
    stats = setup.engine.load({.files = {std::move(file)}});
  };
  const auto pread = [&](const OpenFile& file, std::uint64_t offset, std::byte* target) {
    if (::pread(file.fd(), target, load_bytes, static_cast<off_t>(offset)) != static_cast<ssize_t>(load_bytes))
      throw file.error("pread");
  };
  const auto raw = [&](std::uint64_t offset, std::byte* target) {
    open == Open::kBefore ? pread(opened, offset, target) : pread(OpenFile(path, O_RDONLY), offset, target);
  };
  touch(setup.touched.bytes());
  const Series none(kLoads * load_bytes);
  std::vector<Contender> all{{one_by_one(ours), none}, {one_by_one(raw), none}};
  run_once(setup, all.front(), Cache::kResident, Memory::kTouched, [&](const std::byte* target) {
    for (std::uint64_t i = 0; i < kLoads; ++i)
      setup.checkpoint.check(i * step_bytes, {target + i * load_bytes, load_bytes});
  });
  run_rounds(state, all,
             [&](const Contender& each) { return run_once(setup, each, Cache::kResident, Memory::kTouched); });
  report(state, all, stats);
  const auto us_of = [&](const Series& series) { return static_cast<double>(load_bytes) / series.gb_per_s() / 1e3; };
  state.counters["us/load"] = us_of(all.front().series);
  state.counters["roof_us/load"] = us_of(all.back().series);
  state.counters["cpu_us/load"] = all.front().series.cpu_s_per_gb() * static_cast<double>(load_bytes) / 1e3;
}

// Whether a file is replaced, which costs the freeing of its blocks, too.
enum class Place { kNew, kTaken };

/// Stores the checkpoint in a file, which the destructor removes.
class Store {
 public:
  explicit Store(const Setup& setup) : setup_(setup), path_(setup.checkpoint.path()) { path_ += ".stored"; }
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;
  ~Store() { remove(); }

  TransferStats by_engine(Engine& engine, const std::byte* source, bool checksums) const {
    Metadata metadata = setup_.checkpoint.metadata();
    std::vector<SourceExtent> extents;
    for (const TensorRecord& record : metadata.records) {
      extents.push_back({record.offset_bytes, record.size_bytes, source + record.offset_bytes});
    }
    FileWriter writer = engine.create(path_, {.payload_bytes = metadata.payload_bytes, .checksums = checksums});
    const TransferStats stats = writer.write({.extents = std::move(extents)});
    metadata.checksums = checksums ? std::optional(writer.checksums()) : std::nullopt;
    const std::string footer = encode_footer(metadata);
    writer.commit(std::as_bytes(std::span(footer)));
    return stats;
  }

  // Replaces the file by a rename, as the engine does.
  void by_roofline(std::byte* source) const {
    auto unnamed = path_;
    unnamed += ".new";
    write_direct(unnamed, std::span(source, setup_.checkpoint.metadata().payload_bytes));
    std::filesystem::rename(unnamed, path_);
  }

  // Checks the stored file, with its checksums if it has them. Overwrites the touched memory.
  void check() const {
    const Checkpoint stored(path_, 0, true);
    LoadRequest request = stored.request(setup_.touched.data());
    if (stored.metadata().checksums) request.files.front().checksums = &*stored.metadata().checksums;
    touch(setup_.touched.bytes());
    setup_.engine.load(std::move(request));
    setup_.checkpoint.check(setup_.touched.data());
  }

  void remove() const noexcept {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
  }

 private:
  const Setup& setup_;
  std::filesystem::path path_;
};

// Measures how long it takes to make a durable file from memory that is `offset` bytes past an aligned address.
void bench_store(benchmark::State& state, const Setup& setup, Place place, std::size_t offset = 0) {
  const Checkpoint& checkpoint = setup.checkpoint;
  const Store store(setup);
  std::byte* const source = setup.touched.data() + offset;
  touch(setup.touched.bytes());
  setup.engine.load(checkpoint.request(source));
  store.by_engine(setup.engine, source, true);
  store.check();
  setup.engine.load(checkpoint.request(source));

  TransferStats stats;
  const std::uint64_t size = checkpoint.metadata().payload_bytes;
  const EngineWork ours{setup.engine,
                        [&](Engine& engine, std::byte*) { return store.by_engine(engine, source, false); }};
  std::vector<Contender> all{ours.contender(size, stats)};
  all.push_back({[&](std::byte* memory) { store.by_roofline(memory); }, Series(size)});
  all.push_back({[&](std::byte*) { store.by_engine(setup.engine, source, true); }, Series(size), "checksums"});
  const Turn turn = [&](const Contender& contender) {
    if (place == Place::kNew) store.remove();
    return measure([&] { contender.run(setup.touched.data()); });
  };
  run_rounds(state, all, turn);
  report(state, all, stats);
  report_steps(state, ours, turn);
  store.check();  // The engine stored it last, without checksums, as it does in the rounds.
}

void bench_start(benchmark::State& state) {
  for (auto _ : state) {
    Engine engine;
    benchmark::DoNotOptimize(engine);
  }
}

void register_all(const Setup& setup, int rounds) {
  const auto add = [rounds](const char* name, auto bench) { add_rounds(name, rounds, bench); };
  const auto add_load = [&](const char* name, Cache cache, Memory memory) {
    add(name, [&setup, cache, memory](benchmark::State& state) { bench_load(state, setup, cache, memory); });
  };
  add_load("load/cold/touched_memory", Cache::kCold, Memory::kTouched);
  add_load("load/cold/fresh_memory", Cache::kCold, Memory::kFresh);
  add_load("load/page_cache/touched_memory", Cache::kResident, Memory::kTouched);
  add_load("load/page_cache/fresh_memory", Cache::kResident, Memory::kFresh);
  add_load("load/half_resident/halves", Cache::kHalves, Memory::kTouched);
  add_load("load/half_resident/stripes", Cache::kStripes, Memory::kTouched);
  add("load/page_cache/small_one_by_one",
      [&](benchmark::State& state) { bench_small(state, setup, 16 * kKiB, Open::kByLoad); });
  add("load/page_cache/small_one_by_one/4_kib_open",
      [&](benchmark::State& state) { bench_small(state, setup, 4 * kKiB, Open::kBefore); });
  add("load/cold/workers_beside_ring", [&](benchmark::State& state) { bench_workers(state, setup); });
  add("load/cold/through_slots_beside_in_place", [&](benchmark::State& state) { bench_through_slots(state, setup); });
  const auto add_verified = [&](const char* name, Cache cache) {
    add(name, [&setup, cache](benchmark::State& state) { bench_verified(state, setup, cache); });
  };
  add_verified("load/cold/verified_beside_not", Cache::kCold);
  add_verified("load/page_cache/verified_beside_not", Cache::kResident);
  const auto add_reported = [&](const char* name, Cache cache) {
    add(name, [&setup, cache](benchmark::State& state) { bench_reported(state, setup, cache); });
  };
  add_reported("load/cold/reported_beside_not", Cache::kCold);
  add_reported("load/page_cache/reported_beside_not", Cache::kResident);
  const auto add_store = [&](const char* name, Place place, std::size_t offset) {
    add(name, [&setup, place, offset](benchmark::State& state) { bench_store(state, setup, place, offset); });
  };
  add_store("store/durable/new_file", Place::kNew, 0);
  add_store("store/durable/replaced_file", Place::kTaken, 0);
  add_store("store/durable/through_slots", Place::kNew, kOddBytes);
  register_scattered_rows(setup, rounds);
  register_completion_rows(setup, rounds);
  register_metadata_rows(setup, rounds);
  register_pipeline_rows(setup, rounds);
  register_cost_rows(setup, rounds);
  benchmark::RegisterBenchmark("engine/start", bench_start)->UseRealTime()->Unit(benchmark::kMillisecond);
}

struct Flags {
  double size_gib = 2;
  int rounds = 7;
  std::filesystem::path dir = ".";
  std::filesystem::path file;
};

int run(const Flags& flags) {
  const bool keep = !flags.file.empty();
  const auto path = keep ? flags.file : flags.dir / unique_name("engine_bench");
  const Checkpoint checkpoint(path, static_cast<std::uint64_t>(flags.size_gib * (1 << 30)), keep);
  Engine engine;
  // Direct reads move whole blocks, so the last one ends past the payload.
  internal::HostRegion touched(checkpoint.metadata().payload_bytes + 4096 + kOddBytes, "tensors");
  const Setup setup{checkpoint, engine, touched};
  register_all(setup, flags.rounds);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace
}  // namespace flashpack::bench

int main(int argc, char** argv) try {
  flashpack::bench::Flags flags;
  CLI::App app(
      "Engine loads beside rooflines. Also takes the flags of Google Benchmark, such as --benchmark_filter=REGEX.");
  app.add_option("--size_gib", flags.size_gib, "Size of the generated checkpoint")->capture_default_str();
  app.add_option("--rounds", flags.rounds, "Rounds per line, of which medians are shown")->capture_default_str();
  app.add_option("--dir", flags.dir, "Where the checkpoint is generated, and removed afterwards")
      ->capture_default_str();
  app.add_option("--file", flags.file, "A flashpack file to read instead; made if it is not there, and kept");
  if (const auto status = flashpack::bench::read_command_line(app, argc, argv)) return *status;
  return flashpack::bench::run(flags);
} catch (const std::exception& error) {
  std::cerr << "engine_bench: " << error.what() << '\n';
  return 1;
}
