#include "tools/tune/plain_io.h"

#include <fcntl.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <system_error>
#include <vector>

#include "bench/support/measure.h"
#include "bench/support/open_file.h"
#include "bench/support/roofline.h"

namespace flashpack::bench {

namespace {

double rate_of(
    std::uint64_t bytes, Budget::Clock::time_point end, const std::function<void()>& work,
    const std::function<void()>& after = [] {}) {
  constexpr int kMost = 3;
  Series series(bytes);
  for (int i = 0; i < kMost && (i == 0 || Budget::Clock::now() < end); ++i) {
    series.add(measure(work));
    after();
  }
  return series.gb_per_s();
}

}  // namespace

double plain_reads_gb_per_s(const Subject& subject, const Setting& setting, Budget::Clock::time_point end) {
  const std::uint64_t bytes = subject.sample_bytes(Work::kDisk);
  const OpenFile file(subject.checkpoint.path(), O_RDONLY | O_DIRECT);
  const std::vector<Piece> pieces = pieces_of(file, subject.memory.bytes().first(bytes), setting.chunk_bytes);
  try {
    return rate_of(bytes, end, [&] { read_pieces(pieces, setting.queue_depth); });
  } catch (const std::system_error&) {  // io_uring may be refused. Another error is met again.
    return rate_of(bytes, end, [&] { read_pieces_by_threads(pieces, setting.queue_depth); });
  }
}

double plain_writes_gb_per_s(const Subject& subject, Budget::Clock::time_point end) {
  const std::uint64_t bytes = subject.sample_bytes(Work::kWrites);
  const std::filesystem::path path = subject.checkpoint.path().string() + ".plain";
  std::error_code ignored;
  const auto remove = [&] { std::filesystem::remove(path, ignored); };
  try {
    return rate_of(bytes, end, [&] { write_direct(path, subject.memory.bytes().first(bytes)); }, remove);
  } catch (const std::system_error&) {
    remove();
    throw;
  }
}

}  // namespace flashpack::bench
