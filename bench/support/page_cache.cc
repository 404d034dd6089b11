#include "bench/support/page_cache.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "bench/support/open_file.h"

namespace flashpack::bench {

namespace {

// The kernel skips pages that are busy at the moment, and a warm pass can leave folios out; a few passes settle both.
constexpr int kPasses = 10;

std::runtime_error stays(const std::filesystem::path& path, double fraction, const char* wanted) {
  return std::runtime_error(path.string() + ": " + std::to_string(fraction * 100) + " % in the page cache, wanted " +
                            wanted);
}

void read_range(const OpenFile& file, std::size_t begin, std::size_t end) {
  std::vector<char> buffer(std::size_t{4} << 20);
  for (std::size_t offset = begin; offset < end; offset += buffer.size()) {
    const std::size_t size = std::min(buffer.size(), end - offset);
    if (::pread(file.fd(), buffer.data(), size, static_cast<off_t>(offset)) < 0) throw file.error("read");
  }
}

}  // namespace

double resident_fraction(const std::filesystem::path& path) {
  const OpenFile file(path, O_RDONLY);
  void* mapping = ::mmap(nullptr, file.size_bytes(), PROT_READ, MAP_SHARED, file.fd(), 0);
  if (mapping == MAP_FAILED) throw file.error("map");
  const auto page_bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> pages((file.size_bytes() + page_bytes - 1) / page_bytes);
  const int result = ::mincore(mapping, file.size_bytes(), pages.data());
  ::munmap(mapping, file.size_bytes());
  if (result != 0) throw file.error("mincore");
  const auto resident = std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return (page & 1) != 0; });
  return static_cast<double>(resident) / static_cast<double>(pages.size());
}

void drop_from_page_cache(const std::filesystem::path& path) {
  const OpenFile file(path, O_RDONLY);
  double fraction = 1;
  for (int pass = 0; pass < kPasses && fraction > 0; ++pass) {
    // Dirty pages cannot be dropped.
    if (::fdatasync(file.fd()) != 0) throw file.error("fdatasync");
    if (const int error = ::posix_fadvise(file.fd(), 0, 0, POSIX_FADV_DONTNEED)) throw file.error("fadvise", error);
    fraction = resident_fraction(path);
  }
  if (fraction > 0) throw stays(path, fraction, "none");
}

void warm_half(const std::filesystem::path& path) {
  constexpr std::size_t kStripeBytes = std::size_t{64} << 20;
  const OpenFile file(path, O_RDONLY);
  // Readahead would warm the start of the other half.
  ::posix_fadvise(file.fd(), 0, 0, POSIX_FADV_RANDOM);
  for (std::size_t begin = 0; begin < file.size_bytes(); begin += 2 * kStripeBytes) {
    read_range(file, begin, std::min(begin + kStripeBytes, file.size_bytes()));
  }
}

void warm_page_cache(const std::filesystem::path& path) {
  const OpenFile file(path, O_RDONLY);
  double fraction = resident_fraction(path);
  for (int pass = 0; pass < kPasses && fraction < 1; ++pass) {
    read_range(file, 0, file.size_bytes());
    fraction = resident_fraction(path);
  }
  if (fraction < 1) throw stays(path, fraction, "all");
}

}  // namespace flashpack::bench
