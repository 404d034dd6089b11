#include "bench/support/page_cache.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "bench/support/open_file.h"
#include "engine/ground/pages.h"

namespace flashpack::bench {

namespace {

// The kernel skips pages that are busy, and one read can leave pages uncached; a few passes help against both.
constexpr int kPasses = 10;

// A kernel that is short of memory keeps pages busy for longer than a few passes take, while it looks for some to free,
// and takes back what has just been read.
constexpr std::chrono::seconds kLongestWait{5};

// It has taken half a hundredth of a file back by the time that it is asked, which no figure shows.
constexpr double kWarm = 0.99;

// Passes over a file: a few at once, and then more, with pauses, until the wait has been too long.
class Passes {
 public:
  bool next() {
    if (++passes_ <= kPasses) return true;
    if (std::chrono::steady_clock::now() > deadline_) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return true;
  }
  bool few() const { return passes_ <= kPasses; }

 private:
  const std::chrono::steady_clock::time_point deadline_ = std::chrono::steady_clock::now() + kLongestWait;
  int passes_ = 0;
};

PageCacheError stays(const std::filesystem::path& path, double fraction, const std::string& wanted) {
  return PageCacheError(path.string() + ": " + std::to_string(fraction * 100) + " % in the page cache, wanted " +
                        wanted);
}

void read_range(const OpenFile& file, std::size_t begin, std::size_t end) {
  std::vector<char> buffer(std::size_t{4} << 20);
  for (std::size_t offset = begin; offset < end; offset += buffer.size()) {
    const std::size_t size = std::min(buffer.size(), end - offset);
    if (::pread(file.fd(), buffer.data(), size, static_cast<off_t>(offset)) < 0) throw file.error("read");
  }
}

struct ByteRange {
  std::uint64_t offset_bytes;
  std::uint64_t size_bytes;
};

// By mincore(2), for kernels before 6.5 and containers that refuse cachestat(2). It tells the truth of files that the
// caller may write, as those are that are measured. The mapping is private, because a file system that keeps nothing in
// the page cache refuses a shared one.
std::uint64_t resident_pages(const OpenFile& file, std::uint64_t first, std::uint64_t count) {
  const std::uint64_t page_bytes = internal::system_page_bytes();
  const std::size_t size_bytes = count * page_bytes;
  void* const memory =
      ::mmap(nullptr, size_bytes, PROT_READ, MAP_PRIVATE, file.fd(), static_cast<off_t>(first * page_bytes));
  if (memory == MAP_FAILED) throw file.error("mmap");
  std::vector<unsigned char> pages(count);
  const int error = ::mincore(memory, size_bytes, pages.data()) == 0 ? 0 : errno;
  ::munmap(memory, size_bytes);
  if (error != 0) throw file.error("mincore", error);
  return static_cast<std::uint64_t>(std::count_if(pages.begin(), pages.end(), [](auto page) { return page & 1; }));
}

}  // namespace

double resident_fraction(const std::filesystem::path& path, std::uint64_t offset_bytes, std::uint64_t size_bytes) {
  const OpenFile file(path, O_RDONLY);
  const ByteRange range{offset_bytes, std::min<std::uint64_t>(size_bytes, file.size_bytes() - offset_bytes)};
  const std::uint64_t page_bytes = internal::system_page_bytes();
  const std::uint64_t first = range.offset_bytes / page_bytes;
  const std::uint64_t last = (range.offset_bytes + range.size_bytes + page_bytes - 1) / page_bytes;
  if (last == first) return 0;
  std::array<std::uint64_t, 5> pages{};  // Cached, dirty, in writeback, evicted, recently evicted.
  constexpr long kSysCachestat = 451;
  if (::syscall(kSysCachestat, file.fd(), &range, pages.data(), 0) != 0) {
    if (errno != ENOSYS && errno != EPERM) throw file.error("cachestat");
    pages[0] = resident_pages(file, first, last - first);
  }
  return static_cast<double>(pages[0]) / static_cast<double>(last - first);
}

bool try_drop_from_page_cache(const std::filesystem::path& path) {
  const OpenFile file(path, O_RDONLY);
  double fraction = 1;
  // Where a few passes drop nothing, all pages stay: the file system keeps them.
  for (Passes passes; fraction > 0 && passes.next() && (fraction < 1 || passes.few());) {
    // Dirty pages cannot be dropped.
    if (::fdatasync(file.fd()) != 0) throw file.error("fdatasync");
    if (const int error = ::posix_fadvise(file.fd(), 0, 0, POSIX_FADV_DONTNEED)) throw file.error("fadvise", error);
    fraction = resident_fraction(path);
  }
  if (fraction > 0 && fraction < 1) throw stays(path, fraction, "none");
  return fraction == 0;
}

void drop_from_page_cache(const std::filesystem::path& path) {
  if (!try_drop_from_page_cache(path)) throw stays(path, 1, "none");
}

void warm_every_other(const std::filesystem::path& path, std::uint64_t stripe_bytes) {
  drop_from_page_cache(path);
  const OpenFile file(path, O_RDONLY);
  // Readahead would warm the start of the next stripe.
  ::posix_fadvise(file.fd(), 0, 0, POSIX_FADV_RANDOM);
  const auto hot = [&](std::uint64_t begin) { return begin / stripe_bytes % 2 == 0; };
  double off = 1;
  for (Passes passes; off > 0 && passes.next();) {
    off = 0;
    for (std::uint64_t begin = 0; begin < file.size_bytes(); begin += stripe_bytes) {
      const double fraction = resident_fraction(path, begin, stripe_bytes);
      if (hot(begin) && fraction < 1) read_range(file, begin, std::min(begin + stripe_bytes, file.size_bytes()));
      // Drops the pages that the read of a neighbour has brought in.
      if (!hot(begin) && fraction > 0) {
        ::posix_fadvise(file.fd(), static_cast<off_t>(begin), static_cast<off_t>(stripe_bytes), POSIX_FADV_DONTNEED);
      }
      off = std::max(off, hot(begin) ? kWarm - fraction : fraction);
    }
  }
  if (off > 0) throw PageCacheError(path.string() + ": a stripe is off by " + std::to_string(off * 100) + " %");
}

bool can_stay_in_page_cache(const std::filesystem::path& path) {
  const OpenFile file(path, O_RDONLY);
  const std::size_t size_bytes = std::min(std::size_t{4} << 20, file.size_bytes());
  read_range(file, 0, size_bytes);
  return resident_fraction(path, 0, size_bytes) > 0;
}

void warm_page_cache(const std::filesystem::path& path) {
  const OpenFile file(path, O_RDONLY);
  if (resident_fraction(path) == 1) return;
  read_range(file, 0, file.size_bytes());  // It may take longer than the wait, which begins after it.
  double fraction = resident_fraction(path);
  const auto deadline = std::chrono::steady_clock::now() + kLongestWait;
  while (fraction < kWarm && std::chrono::steady_clock::now() < deadline) {
    read_range(file, 0, file.size_bytes());
    fraction = resident_fraction(path);
  }
  if (fraction < kWarm) throw stays(path, fraction, "99 %");
}

}  // namespace flashpack::bench
