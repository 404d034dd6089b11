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
#include "tools/tune/written_file.h"

namespace flashpack::bench {

namespace {

double rate_of(std::uint64_t bytes, Budget::Clock::time_point end, const std::function<Sample()>& take) {
  constexpr int kMost = 3;
  Series series(bytes);
  for (int i = 0; i < kMost && (i == 0 || Budget::Clock::now() < end); ++i) series.add(take());
  return series.gb_per_s();
}

}  // namespace

double plain_reads_gb_per_s(const Subject& subject, const Setting& setting, Budget::Clock::time_point end) {
  const std::uint64_t bytes = subject.sample_bytes(Work::kDisk);
  const OpenFile file(subject.checkpoint.path(), O_RDONLY | O_DIRECT);
  const std::vector<Piece> pieces = pieces_of(file, subject.memory.bytes().first(bytes), setting.chunk_bytes);
  try {
    return rate_of(bytes, end, [&] { return measure([&] { read_pieces(pieces, setting.queue_depth); }); });
  } catch (const std::system_error&) {  // io_uring may be refused. Another error is met again.
    return rate_of(bytes, end, [&] { return measure([&] { read_pieces_by_threads(pieces, setting.queue_depth); }); });
  }
}

double plain_writes_gb_per_s(const Subject& subject, Budget::Clock::time_point end) {
  const std::uint64_t bytes = subject.sample_bytes(Work::kWrites);
  const std::filesystem::path path = subject.checkpoint.path().string() + ".plain";
  return rate_of(bytes, end, [&] {
    const WrittenFile written(path);
    return measure([&] { write_direct(path, subject.memory.bytes().first(bytes)); });
  });
}

}  // namespace flashpack::bench
