#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <functional>
#include <optional>
#include <stdexcept>

#include "bench/program.h"
#include "bench/rows.h"
#include "bench/support/engine_parts.h"
#include "bench/support/open_file.h"
#include "bench/support/page_cache.h"
#include "bench/support/roofline.h"
#include "engine/ground/mappings.h"
#include "engine/ground/rounding.h"
#include "engine/ground/units.h"

namespace flashpack::bench {
namespace {

using internal::HostRegion;
using internal::kHugePageBytes;

using internal::kMiB;

/// One way to do the same work, `count` times in a turn.
struct Way {
  std::string name;
  double count;
  std::function<void()> prepare;
  std::function<void()> run;
};

// Shows, for each way, the time of one piece of work, and the median of its CPU time.
void time_in_turns(benchmark::State& state, const std::vector<Way>& ways) {
  std::vector<std::vector<double>> wall_us(ways.size());
  std::vector<std::vector<double>> cpu_us(ways.size());
  take_turns(state, ways.size(), [&](std::size_t i) {
    if (ways[i].prepare) ways[i].prepare();
    const Sample sample = measure(ways[i].run);
    wall_us[i].push_back(sample.seconds * 1e6 / ways[i].count);
    cpu_us[i].push_back(sample.cpu_seconds * 1e6 / ways[i].count);
    return sample;
  });
  for (std::size_t i = 0; i < ways.size(); ++i) {
    show(state, ways[i].name + "_", "us", summarize(wall_us[i]));
    state.counters[ways[i].name + "_cpu_us"] = median(cpu_us[i]);
  }
}

/// Places in the file, all of the same size and far from each other, against the order of the file.
class Places {
 public:
  Places(const Setup& setup, std::uint64_t size_bytes) : setup_(setup), size_bytes_(size_bytes) {
    constexpr std::uint64_t kDistanceBytes = kMiB;
    const std::uint64_t payload_bytes = setup.checkpoint.metadata().payload_bytes;
    for (std::uint64_t at = 0; at + kDistanceBytes <= payload_bytes && offsets_.size() < kPlaces; at += kDistanceBytes)
      offsets_.insert(offsets_.begin(), at);
    if (offsets_.empty()) throw std::runtime_error("the file is too small");
    touch(setup.touched.bytes());
  }

  /// Past the page cache, 32 in flight: at each place one read for each element of `parts`, an offset and a size there.
  /// Then copies `copied_bytes` of each place.
  Way way(std::string name, const std::vector<std::pair<std::uint64_t, std::uint64_t>>& parts,
          std::uint64_t copied_bytes) const {
    const auto prepare = [this] { drop_from_page_cache(setup_.checkpoint.path()); };
    const auto run = [=, this] {
      const OpenFile file(setup_.checkpoint.path(), O_RDONLY | O_DIRECT);
      std::vector<Piece> pieces;
      for (std::size_t i = 0; i < offsets_.size(); ++i) {
        for (const auto& [offset, size] : parts)
          pieces.push_back({&file, offsets_[i] + offset, {memory(i) + offset, size}});
      }
      read_pieces(pieces, kDepth);
      for (std::size_t i = 0; copied_bytes > 0 && i < offsets_.size(); ++i)
        std::memcpy(memory(i) + size_bytes_, memory(i), copied_bytes);
    };
    return {std::move(name), static_cast<double>(offsets_.size()), prepare, run};
  }

 private:
  static constexpr std::size_t kPlaces = 1024;

  // Each place has as much memory again, to copy to.
  std::byte* memory(std::size_t place) const { return setup_.touched.data() + place * 2 * size_bytes_; }

  const Setup& setup_;
  const std::uint64_t size_bytes_;
  std::vector<std::uint64_t> offsets_;
};

// Compares one read of two neighbours and the gap between them with a read of each.
void bench_gap(benchmark::State& state, const Setup& setup, std::uint64_t gap_bytes) {
  constexpr std::uint64_t kWanted = 16 * kKiB;
  const std::uint64_t size = 2 * kWanted + gap_bytes;
  const Places places(setup, size);
  time_in_turns(state, {places.way("over_gap", {{0, size}}, 0),
                        places.way("apart", {{0, kWanted}, {kWanted + gap_bytes, kWanted}}, 0)});
}

// Compares two ways to read bytes that have small neighbours on both sides: with them, through a slot, and in place, by
// a read of their own between two others. Copies come after all reads here, where the engine's go beside them, so that
// the CPU time says more than the time.
void bench_in_place(benchmark::State& state, const Setup& setup, std::uint64_t bytes) {
  const std::uint64_t size = bytes + 2 * kPageBytes;
  const Places places(setup, size);
  time_in_turns(state, {places.way("slot", {{0, size}}, size),
                        places.way("in_place", {{0, kPageBytes}, {kPageBytes, bytes}, {kPageBytes + bytes, kPageBytes}},
                                   2 * kPageBytes)});
}

// Reads the file a page at a time without readahead, so that the page cache has it in pages of 4 KiB.
void warm_in_small_pages(const std::filesystem::path& path) {
  drop_from_page_cache(path);
  const OpenFile file(path, O_RDONLY);
  if (const int code = ::posix_fadvise(file.fd(), 0, 0, POSIX_FADV_RANDOM)) throw file.error("fadvise", code);
  std::vector<std::byte> page(kPageBytes);
  const std::size_t size = file.size_bytes();
  for (std::size_t at = 0; at < size; at += kPageBytes) {
    if (::pread(file.fd(), page.data(), kPageBytes, static_cast<off_t>(at)) < 0) throw file.error("read");
  }
}

// Measures a question whether a chunk of 4 MiB is in the page cache, which may have it in large or in small pages.
void bench_residency(benchmark::State& state, const Setup& setup) {
  constexpr std::uint64_t kChunkBytes = 4 * kMiB;
  const OpenFile file(setup.checkpoint.path(), O_RDONLY);
  const auto cached = cache_question(file.fd());
  const std::uint64_t chunks = setup.checkpoint.metadata().payload_bytes / kChunkBytes;
  if (chunks == 0) throw std::runtime_error("the file is too small");
  // Others may drop a page of the file meanwhile.
  double wrong = 0;
  const auto ask = [&](bool expected) {
    for (std::uint64_t i = 0; i < chunks; ++i) wrong += cached(i * kChunkBytes, kChunkBytes) != expected;
  };
  const auto count = static_cast<double>(chunks);
  const std::filesystem::path& path = setup.checkpoint.path();
  const auto warm = [&] {
    drop_from_page_cache(path);
    warm_page_cache(path);
  };
  time_in_turns(state, {{"cached", count, warm, [&] { ask(true); }},
                        {"in_small_pages", count, [&] { warm_in_small_pages(path); }, [&] { ask(true); }},
                        {"cold", count, [&] { drop_from_page_cache(path); }, [&] { ask(false); }}});
  state.counters["wrong_answers"] = wrong;
}

// Compares waking a thread of the pool, which wakes this one when it is done, with reading from the page cache here.
void bench_wake(benchmark::State& state, const Setup& setup) {
  constexpr std::uint64_t kBytes = 256 * kKiB;
  constexpr int kCount = 1'000;
  warm_page_cache(setup.checkpoint.path());
  touch(setup.touched.bytes());
  const OpenFile file(setup.checkpoint.path(), O_RDONLY);
  const std::uint64_t places = setup.checkpoint.metadata().payload_bytes / kBytes;
  if (places == 0) throw std::runtime_error("the file is too small");
  PoolThread thread;
  const auto wake = [&] {
    for (int i = 0; i < kCount; ++i) thread.wake();
  };
  const auto read = [&] {
    for (int i = 0; i < kCount; ++i) {
      const std::uint64_t at = static_cast<std::uint64_t>(i) % places * kBytes;
      if (::pread(file.fd(), setup.touched.data() + at, kBytes, static_cast<off_t>(at)) != kBytes)
        throw file.error("read", EIO);
    }
  };
  time_in_turns(state, {{"there_and_back", kCount, {}, wake}, {"read_256_kib", kCount, {}, read}});
}

// Compares what the system takes to provide 2 MiB of memory in small pages and in one huge page.
void bench_first_touch(benchmark::State& state) {
  constexpr std::uint64_t kSize = 64 * kMiB;
  constexpr double kCount = kSize / kHugePageBytes;
  std::optional<HostRegion> fresh;
  const auto prepare = [&](int advice) {
    fresh.emplace(kSize, "tensors");
    if (::madvise(fresh->data(), kSize, advice) != 0) throw std::runtime_error("the kernel has no huge pages");
  };
  const auto run = [&] { touch(fresh->bytes()); };
  time_in_turns(state, {{"small_pages", kCount, [&] { prepare(MADV_NOHUGEPAGE); }, run},
                        {"huge_page", kCount, [&] { prepare(MADV_HUGEPAGE); }, run}});
}

// Compares what may come before a copy of 4 MiB to or from memory whose pages are present, with the copy: populating
// that memory once more, asking whether it is anonymous and present, and a copy by the kernel, which answers where
// memory is missing.
void bench_touchable(benchmark::State& state) {
  constexpr std::uint64_t kSize = 4 * kMiB;
  constexpr int kCount = 100;
  HostRegion source(kSize, "tensors");
  HostRegion target(kSize, "tensors");
  HostRegion huge(kSize, "tensors");
  ::madvise(target.data(), kSize, MADV_NOHUGEPAGE);
  for (const HostRegion* region : {&source, &target, &huge}) touch(region->bytes());
  const auto times = [](auto work) {
    return [work] {
      for (int i = 0; i < kCount; ++i) work();
    };
  };
  const auto populate = [](const HostRegion& region) {
    return [&region] {
      if (::madvise(region.data(), kSize, MADV_POPULATE_WRITE) != 0) throw std::runtime_error("populating is refused");
    };
  };
  const auto ask = [](const HostRegion& region) {
    return [&region] {
      std::array<unsigned char, kSize / kPageBytes> pages;
      if (!internal::Mappings().are_anonymous_and_readable(region.bytes()) ||
          ::mincore(region.data(), kSize, pages.data()) != 0)
        throw std::runtime_error("the kernel does not tell");
    };
  };
  const auto by_kernel = [&] {
    const iovec from{source.data(), kSize};
    const iovec to{target.data(), kSize};
    if (::process_vm_writev(::getpid(), &from, 1, &to, 1, 0) != ssize_t{kSize})
      throw std::runtime_error("a copy by the kernel is refused");
  };
  time_in_turns(state, {{"populate", kCount, {}, times(populate(target))},
                        {"populate_huge", kCount, {}, times(populate(huge))},
                        {"ask", kCount, {}, times(ask(target))},
                        {"ask_huge", kCount, {}, times(ask(huge))},
                        {"copy", kCount, {}, times([&] { std::memcpy(target.data(), source.data(), kSize); })},
                        {"copy_by_kernel", kCount, {}, times(by_kernel)}});
}

// Compares a copy of 4 MiB to fresh memory with small pages, with and without populating the memory first.
void bench_fresh_copy(benchmark::State& state) {
  constexpr std::uint64_t kCopyBytes = 4 * kMiB;
  constexpr std::uint64_t kCopies = 16;
  HostRegion source(kCopyBytes, "tensors");
  touch(source.bytes());
  std::optional<HostRegion> fresh;
  const auto prepare = [&] {
    fresh.emplace(kCopies * kCopyBytes, "tensors");
    ::madvise(fresh->data(), kCopies * kCopyBytes, MADV_NOHUGEPAGE);
  };
  const auto copy = [&](bool populates) {
    return [&, populates] {
      for (std::uint64_t at = 0; at < kCopies * kCopyBytes; at += kCopyBytes) {
        std::byte* const target = fresh->data() + at;
        if (populates && ::madvise(target, kCopyBytes, MADV_POPULATE_WRITE) != 0)
          throw std::runtime_error("populating is refused");
        std::memcpy(target, source.data(), kCopyBytes);
      }
    };
  };
  time_in_turns(state, {{"populated", kCopies, prepare, copy(true)}, {"not", kCopies, prepare, copy(false)}});
}

// Compares direct reads of `bytes`, 8 in flight, into small pages and into huge ones.
void bench_read_into(benchmark::State& state, const Setup& setup, std::uint64_t bytes) {
  const std::uint64_t count = std::min<std::uint64_t>(setup.checkpoint.metadata().payload_bytes, 256 * kMiB) / bytes;
  const std::uint64_t size = count * bytes;
  HostRegion small(size + kPageBytes, "tensors");
  HostRegion huge(size + kPageBytes, "tensors");
  if (::madvise(small.data(), size, MADV_NOHUGEPAGE) != 0) throw std::runtime_error("the kernel has no huge pages");
  for (const HostRegion* region : {&small, &huge}) touch(region->bytes());
  const auto prepare = [&] { drop_from_page_cache(setup.checkpoint.path()); };
  const OpenFile direct(setup.checkpoint.path(), O_RDONLY | O_DIRECT);
  const auto read = [&](const HostRegion& into) {
    return [&] {
      std::vector<Piece> pieces;
      for (std::uint64_t at = 0; at < size; at += bytes)
        pieces.push_back({&direct, at, into.bytes().subspan(at, bytes)});
      read_pieces(pieces, 8);
    };
  };
  const auto reads = static_cast<double>(count);
  time_in_turns(state, {{"small_pages", reads, prepare, read(small)}, {"huge_pages", reads, prepare, read(huge)}});
}

}  // namespace

void register_cost_rows(const Setup& setup, int rounds) {
  for (const std::uint64_t kib : {16u, 64u, 256u}) {
    add_rounds("cost/gap_" + std::to_string(kib) + "_kib", rounds,
               [=, &setup](benchmark::State& state) { bench_gap(state, setup, kib * kKiB); });
  }
  for (const std::uint64_t kib : {32u, 64u, 128u, 256u}) {
    add_rounds("cost/in_place_" + std::to_string(kib) + "_kib", rounds,
               [=, &setup](benchmark::State& state) { bench_in_place(state, setup, kib * kKiB); });
  }
  add_rounds("cost/residency", rounds, [&](benchmark::State& state) { bench_residency(state, setup); });
  add_rounds("cost/wake", rounds, [&](benchmark::State& state) { bench_wake(state, setup); });
  add_rounds("cost/first_touch", rounds, bench_first_touch);
  add_rounds("cost/touchable", rounds, bench_touchable);
  add_rounds("cost/fresh_copy", rounds, bench_fresh_copy);
  for (const std::uint64_t kib : {64u, 256u, 1024u, 2048u, 4096u}) {
    add_rounds("cost/read_into_" + std::to_string(kib) + "_kib", rounds,
               [=, &setup](benchmark::State& state) { bench_read_into(state, setup, kib * kKiB); });
  }
}

}  // namespace flashpack::bench
