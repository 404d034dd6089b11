#include <fcntl.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <random>
#include <stdexcept>

#include "bench/program.h"
#include "bench/rows.h"
#include "bench/support/open_file.h"
#include "bench/support/page_cache.h"
#include "bench/support/roofline.h"

namespace flashpack::bench {
namespace {

// Measures a load of the whole file with one extent for every 20,000 bytes, the size of a small tensor.
void bench_small_tensors(benchmark::State& state, const Setup& setup, Cache cache) {
  constexpr std::uint64_t kSmallTensorBytes = 20'000;
  const std::uint64_t size = setup.checkpoint.metadata().payload_bytes;
  const auto ours = [&](Engine& engine, std::byte* target) {
    FileExtents file{.path = setup.checkpoint.path()};
    file.extents.reserve(size / kSmallTensorBytes + 1);
    for (std::uint64_t at = 0; at < size; at += kSmallTensorBytes)
      file.extents.push_back({at, std::min(kSmallTensorBytes, size - at), target + at});
    return engine.load({.files = {std::move(file)}});
  };
  bench_in_turns(state, setup, {setup.engine, ours}, rooflines(setup, cache), cache);
}

/// The payload of the checkpoint in 64 files, which the destructor removes. With 2 GiB, each has 32 MiB.
class Shards {
 public:
  explicit Shards(const Setup& setup) : size_bytes_(setup.checkpoint.metadata().payload_bytes) {
    constexpr std::uint64_t kFiles = 64;
    shard_bytes_ = (size_bytes_ / kFiles / kPageBytes + 1) * kPageBytes;
    setup.engine.load(setup.checkpoint.request(setup.touched.data()));
    for (std::uint64_t at = 0; at < size_bytes_; at += shard_bytes_) {
      paths_.push_back(setup.checkpoint.path().native() + ".shard" + std::to_string(paths_.size()));
      write_direct(paths_.back(), memory_of(paths_.size() - 1, setup.touched.data()));
      std::filesystem::resize_file(paths_.back(), memory_of(paths_.size() - 1, nullptr).size());
    }
  }
  Shards(const Shards&) = delete;
  Shards& operator=(const Shards&) = delete;
  ~Shards() {
    std::error_code ignored;
    for (const auto& path : paths_) std::filesystem::remove(path, ignored);
  }

  void drop() const { std::ranges::for_each(paths_, drop_from_page_cache); }

  LoadRequest request(std::byte* target) const {
    LoadRequest request;
    for (std::size_t i = 0; i < paths_.size(); ++i) {
      const std::span<std::byte> memory = memory_of(i, target);
      request.files.push_back({.path = paths_[i], .extents = {{0, memory.size(), memory.data()}}});
    }
    return request;
  }

  // Keeps the disk busy from one file to the next.
  void read_by_roofline(std::byte* target) const {
    std::deque<OpenFile> files;
    std::vector<Piece> all;
    for (std::size_t i = 0; i < paths_.size(); ++i) {
      const std::vector<Piece> pieces =
          pieces_of(files.emplace_back(paths_[i], O_RDONLY | O_DIRECT), memory_of(i, target));
      all.insert(all.end(), pieces.begin(), pieces.end());
    }
    read_pieces(all, kQueueDepth);
  }

 private:
  std::span<std::byte> memory_of(std::size_t shard, std::byte* payload) const {
    const std::uint64_t begin = shard * shard_bytes_;
    return {payload + begin, std::min(shard_bytes_, size_bytes_ - begin)};
  }

  std::uint64_t size_bytes_;
  std::uint64_t shard_bytes_;
  std::vector<std::filesystem::path> paths_;
};

// Measures a cold load of 64 files in one request.
void bench_many_files(benchmark::State& state, const Setup& setup) {
  const Shards shards(setup);
  const std::uint64_t size = setup.checkpoint.metadata().payload_bytes;
  TransferStats stats;
  const EngineWork ours{setup.engine,
                        [&](Engine& engine, std::byte* target) { return engine.load(shards.request(target)); }};
  std::vector<Contender> all{ours.contender(size, stats)};
  all.push_back({[&](std::byte* target) { shards.read_by_roofline(target); }, Series(size)});
  const Turn turn = [&](const Contender& contender) {
    shards.drop();
    return measure([&] { contender.run(setup.touched.data()); });
  };
  touch(setup.touched.bytes());
  turn(all.front());
  setup.checkpoint.check(setup.touched.data());
  run_rounds(state, all, turn);
  report(state, all, stats);
  report_steps(state, ours, turn);
}

constexpr std::uint64_t kReadBytes = 64 << 10;

constexpr std::size_t kReads = 4096;

// Offsets of reads, each at a random page of its own 128 KiB, in random order.
std::vector<std::uint64_t> random_offsets(std::uint64_t payload_bytes) {
  constexpr std::uint64_t kCellBytes = 2 * kReadBytes;
  std::vector<std::uint64_t> cells;
  for (std::uint64_t at = 0; at + kCellBytes <= payload_bytes; at += kCellBytes) cells.push_back(at);
  if (cells.size() < kReads) throw std::runtime_error("random reads need a file of at least 512 MiB");
  std::mt19937_64 random(1);
  std::ranges::shuffle(cells, random);
  cells.resize(kReads);
  for (std::uint64_t& offset : cells) offset += random() % (kReadBytes / kPageBytes + 1) * kPageBytes;
  return cells;
}

// Offsets of reads that follow on each other, in random order, so that their memory does not.
std::vector<std::uint64_t> run_of_offsets(std::uint64_t payload_bytes) {
  if (payload_bytes < kReads * kReadBytes) throw std::runtime_error("a run of reads needs a file of at least 256 MiB");
  std::vector<std::uint64_t> offsets;
  for (std::size_t i = 0; i < kReads; ++i) offsets.push_back(i * kReadBytes);
  std::mt19937_64 random(1);
  std::ranges::shuffle(offsets, random);
  return offsets;
}

// Measures one request of reads of 64 KiB at `offsets` beside `plain`, which reads as many bytes by plain io_uring.
void bench_reads(benchmark::State& state, const Setup& setup, const std::vector<std::uint64_t>& offsets,
                 const EngineOptions& options, const std::function<void(std::byte*)>& plain) {
  Engine engine(options);
  TransferStats stats;
  const auto load = [&](Engine& by, std::byte* target) {
    FileExtents file{.path = setup.checkpoint.path()};
    for (std::size_t i = 0; i < offsets.size(); ++i)
      file.extents.push_back({offsets[i], kReadBytes, target + i * kReadBytes});
    return by.load({.files = {std::move(file)}});
  };
  const EngineWork ours{engine, load};
  const std::uint64_t size = offsets.size() * kReadBytes;
  std::vector<Contender> all{ours.contender(size, stats), {plain, Series(size)}};
  const Turn turn = [&](const Contender& each) { return run_once(setup, each, Cache::kCold, Memory::kTouched); };
  turn(all.back());
  touch(setup.touched.bytes());
  turn(all.front());
  for (std::size_t i = 0; i < offsets.size(); ++i)
    setup.checkpoint.check(offsets[i], {setup.touched.data() + i * kReadBytes, kReadBytes});
  run_rounds(state, all, turn);
  report(state, all, stats);
  report_steps(state, ours, turn);
}

// Both have 32 reads in flight.
void bench_random(benchmark::State& state, const Setup& setup) {
  const std::vector<std::uint64_t> offsets = random_offsets(setup.checkpoint.metadata().payload_bytes);
  const OpenFile direct(setup.checkpoint.path(), O_RDONLY | O_DIRECT);
  const auto plain = [&](std::byte* target) {
    std::vector<Piece> pieces;
    for (std::size_t i = 0; i < offsets.size(); ++i)
      pieces.push_back({&direct, offsets[i], {target + i * kReadBytes, kReadBytes}});
    read_pieces(pieces, kDepth);
  };
  bench_reads(state, setup, offsets, {.queue_depth = kDepth, .staging_bytes = std::uint64_t{256} << 20}, plain);
}

// Plain io_uring reads the same part of the file in large pieces.
void bench_run(benchmark::State& state, const Setup& setup) {
  const std::vector<std::uint64_t> offsets = run_of_offsets(setup.checkpoint.metadata().payload_bytes);
  const auto plain = [&](std::byte* target) { read_direct(setup.checkpoint.path(), {target, kReads * kReadBytes}); };
  bench_reads(state, setup, offsets, {}, plain);
}

}  // namespace

void register_scattered_rows(const Setup& setup, int rounds) {
  add_rounds("load/cold/small_tensors", rounds,
             [&](benchmark::State& state) { bench_small_tensors(state, setup, Cache::kCold); });
  add_rounds("load/page_cache/small_tensors", rounds,
             [&](benchmark::State& state) { bench_small_tensors(state, setup, Cache::kResident); });
  add_rounds("load/cold/64_files", rounds, [&](benchmark::State& state) { bench_many_files(state, setup); });
  add_rounds("load/cold/random_64_kib", rounds, [&](benchmark::State& state) { bench_random(state, setup); });
  add_rounds("load/cold/run_of_64_kib", rounds, [&](benchmark::State& state) { bench_run(state, setup); });
}

}  // namespace flashpack::bench
