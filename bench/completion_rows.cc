#include <fcntl.h>
#include <poll.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/io_context.hpp>
#include <exception>
#include <random>
#include <semaphore>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "bench/program.h"
#include "bench/rows.h"
#include "bench/support/open_file.h"
#include "bench/support/roofline.h"
#include "flashpack/async.h"
#include "flashpack/coroutine.h"
#include "flashpack/event_queue.h"

namespace flashpack::bench {
namespace {

/// Reads at random places of a file, one load each, to memory without gaps.
class Reads {
 public:
  Reads(const Checkpoint& checkpoint, std::size_t count, std::uint64_t least_bytes, std::uint64_t most_bytes)
      : checkpoint_(checkpoint) {
    std::vector<std::uint64_t> cells;
    for (std::uint64_t at = 0; at + most_bytes <= checkpoint.metadata().payload_bytes; at += most_bytes)
      cells.push_back(at);
    if (cells.size() < count) throw std::runtime_error("so many loads need a larger file");
    std::mt19937_64 random(1);
    std::ranges::shuffle(cells, random);
    cells.resize(count);
    const auto pages_up_to = [&random](std::uint64_t bytes) {
      return random() % (bytes / kPageBytes + 1) * kPageBytes;
    };
    for (const std::uint64_t cell : cells) {
      const std::uint64_t size = least_bytes + pages_up_to(most_bytes - least_bytes);
      all_.push_back({cell + pages_up_to(most_bytes - size), size, size_bytes_});
      size_bytes_ += size;
    }
  }

  std::size_t count() const { return all_.size(); }
  std::uint64_t size_bytes() const { return size_bytes_; }

  // The file is opened by the load if `file` is not valid.
  LoadRequest request(std::size_t index, std::byte* target, const FileHandle& file) const {
    const Read& read = all_[index];
    LoadRequest request;
    request.files.push_back(
        {.extents = {{read.offset_bytes, read.size_bytes, target + read.at_bytes}}, .handle = file});
    if (!file.valid()) request.files.front().path = checkpoint_.path();
    return request;
  }

  void read_raw(const OpenFile& file, std::byte* target) const {
    std::vector<Piece> pieces;
    for (const Read& read : all_)
      pieces.push_back({&file, read.offset_bytes, {target + read.at_bytes, read.size_bytes}});
    read_pieces(pieces, kDepth);
  }

  void check(const std::byte* target) const {
    for (const Read& read : all_) checkpoint_.check(read.offset_bytes, {target + read.at_bytes, read.size_bytes});
  }

 private:
  struct Read {
    std::uint64_t offset_bytes;
    std::uint64_t size_bytes;
    std::uint64_t at_bytes;
  };

  const Checkpoint& checkpoint_;
  std::vector<Read> all_;
  std::uint64_t size_bytes_ = 0;
};

/// Counts loads that end on an engine's driver thread. It must outlive the engine, because the last wait() may return
/// before the driver has left end().
class Countdown final : public Completion {
 public:
  void begin(std::size_t loads) { left_ = loads; }
  void end(const TransferStats& stats) noexcept {
    if (--left_ > 0) return;
    last_ = stats;
    ended_.release();
  }
  TransferStats wait() {
    ended_.acquire();
    return last_;
  }
  void done(Transfer& load) noexcept override {
    if (load.error()) std::terminate();
    end(load.stats());
  }

 private:
  std::atomic<std::size_t> left_ = 0;
  std::binary_semaphore ended_{0};
  TransferStats last_;
};

struct Work {
  Engine& engine;
  Countdown& countdown;
  const Reads& reads;
  std::byte* target;
  const FileHandle& file;

  LoadRequest request(std::size_t index) const { return reads.request(index, target, file); }
};

/// Starts all loads, so that they are outstanding at once, waits for them in its own way, and returns the statistics of
/// one of them.
using Form = TransferStats (*)(const Work&);

TransferStats wait_for_transfers(const Work& work) {
  std::vector<Transfer> loads(work.reads.count());
  for (std::size_t i = 0; i < loads.size(); ++i) loads[i] = work.engine.start_load(work.request(i));
  TransferStats stats;
  for (Transfer& load : loads) stats = load.wait();
  return stats;
}

TransferStats be_called(const Work& work) {
  work.countdown.begin(work.reads.count());
  for (std::size_t i = 0; i < work.reads.count(); ++i)
    work.engine.start_load(work.request(i), &work.countdown).detach();
  return work.countdown.wait();
}

TransferStats poll_a_queue(const Work& work) {
  EventQueue queue;
  std::vector<Transfer> loads(work.reads.count());
  for (std::size_t i = 0; i < loads.size(); ++i) loads[i] = queue.start_load(work.engine, work.request(i), i);
  std::array<Event, 64> events;
  for (std::size_t left = loads.size(); left > 0;) {
    pollfd readable{.fd = queue.fd(), .events = POLLIN, .revents = 0};
    ::poll(&readable, 1, -1);
    for (const Event& event : std::span(events).first(queue.take(events))) {
      if (event.error) throw std::system_error(event.error, "load");
      --left;
    }
  }
  return loads.back().stats();
}

TransferStats run_asio(const Work& work) {
  boost::asio::io_context context(1);
  TransferStats stats;
  for (std::size_t i = 0; i < work.reads.count(); ++i) {
    async_load(work.engine, work.request(i),
               boost::asio::bind_executor(context, [&stats](const std::exception_ptr& error, TransferStats ended) {
                 if (error) std::rethrow_exception(error);
                 stats = std::move(ended);
               }));
  }
  context.run();
  return stats;
}

struct Coroutine {
  struct promise_type {
    Coroutine get_return_object() noexcept { return {}; }
    std::suspend_never initial_suspend() noexcept { return {}; }
    std::suspend_never final_suspend() noexcept { return {}; }
    void return_void() noexcept {}
    void unhandled_exception() noexcept { std::terminate(); }
  };
};

Coroutine await_load(const Work& work, std::size_t index) {
  const TransferStats stats = co_await co_load(work.engine, work.request(index));
  work.countdown.end(stats);
}

TransferStats await_all(const Work& work) {
  work.countdown.begin(work.reads.count());
  for (std::size_t i = 0; i < work.reads.count(); ++i) await_load(work, i);
  return work.countdown.wait();
}

// Measures loads that are outstanding all at once, one start_load() for each, beside plain io_uring at the depth of the
// engine, which goes through the page cache if the file is in it.
void bench_form(benchmark::State& state, const Setup& setup, const Reads& reads, Form form, Cache cache, Open open) {
  const OpenFile file(setup.checkpoint.path(), cache == Cache::kCold ? O_RDONLY | O_DIRECT : O_RDONLY);
  Countdown countdown;
  Engine engine({.queue_depth = kDepth, .staging_bytes = std::uint64_t{256} << 20});
  TransferStats stats;
  const EngineWork ours{engine, [&](Engine& by, std::byte* target) {
                          const FileHandle handle =
                              open == Open::kBefore ? by.open(setup.checkpoint.path()) : FileHandle();
                          return form({by, countdown, reads, target, handle});
                        }};
  const auto raw = [&](std::byte* target) { reads.read_raw(file, target); };
  std::vector<Contender> all{ours.contender(reads.size_bytes(), stats), {raw, Series(reads.size_bytes())}};
  const auto turn = [&](const Contender& each) { return run_once(setup, each, cache, Memory::kTouched); };
  for (const Contender& each : all) {
    touch(setup.touched.bytes());
    turn(each);
    reads.check(setup.touched.data());
  }
  run_rounds(state, all, turn);
  report(state, all, stats);
  report_steps(state, ours, turn);
  const auto cpu_us_per_load = [&reads](const Contender& each) {
    const double gb_per_load = static_cast<double>(reads.size_bytes()) / 1e9 / static_cast<double>(reads.count());
    return each.series.cpu_s_per_gb() * gb_per_load * 1e6;
  };
  const double ours_us = cpu_us_per_load(all.front());
  const double roof_us = cpu_us_per_load(all.back());
  state.counters["cpu_us/load"] = ours_us;
  state.counters["roof_cpu_us/load"] = roof_us;
  state.counters["own_cpu_us/load"] = ours_us - roof_us;  // Without what the kernel needs to move the bytes.
  state.counters["cpu_of_roof"] = ours_us / roof_us;
}

}  // namespace

void register_completion_rows(const Setup& setup, int rounds) {
  struct Size {
    const char* name;
    std::size_t loads;
    std::uint64_t least_bytes;
    std::uint64_t most_bytes;
    Open open = Open::kByLoad;
  };
  constexpr std::array kSizes{Size{"1_mib", 1000, 1024 * kKiB, 1024 * kKiB}, Size{"small", 10'000, 4 * kKiB, 64 * kKiB},
                              Size{"small_open", 10'000, 4 * kKiB, 64 * kKiB, Open::kBefore}};
  constexpr std::array<std::pair<const char*, Form>, 5> kForms{{{"transfer", wait_for_transfers},
                                                                {"completion", be_called},
                                                                {"event_queue", poll_a_queue},
                                                                {"asio", run_asio},
                                                                {"coroutine", await_all}}};
  for (const Cache cache : {Cache::kCold, Cache::kResident}) {
    for (const Size& size : kSizes) {
      for (const auto& [name, form] : kForms) {
        const std::string row =
            std::string(cache == Cache::kCold ? "load/cold" : "load/page_cache") + "/forms/" + size.name + "/" + name;
        add_rounds(row, rounds, [&setup, size, form, cache](benchmark::State& state) {
          const Reads reads(setup.checkpoint, size.loads, size.least_bytes, size.most_bytes);
          bench_form(state, setup, reads, form, cache, size.open);
        });
      }
    }
  }
}

}  // namespace flashpack::bench
