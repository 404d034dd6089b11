#include "engine/residency.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>

#include "engine/ground/error.h"
#include "engine/ground/pages.h"

namespace flashpack::internal {

namespace {

// Declared here, because cachestat(2) came with Linux 6.5 and the oldest supported headers lack it.
constexpr long kSysCachestat = 451;
struct CachestatRange {
  std::uint64_t offset_bytes;
  std::uint64_t size_bytes;
};
struct Cachestat {
  std::uint64_t cached_pages;
  std::uint64_t dirty_pages;
  std::uint64_t writeback_pages;
  std::uint64_t evicted_pages;
  std::uint64_t recently_evicted_pages;
};

// Each wrong answer costs a refused read, and a file that is being evicted or truncated gives many. This bounds what a
// file can lose that way, and is not tuned.
constexpr unsigned kMaxWrongAnswers = 4;

// A kernel that runs short of memory takes single pages out of the cache. A chunk of which few are missing is read
// from there, and the kernel reads the missing ones. That costs the first load what it saves at best, and the later
// ones gain, because the cache is whole then (bench/README.md, "page cache with holes"). The part is a bound, and not
// tuned.
constexpr std::uint64_t kFewMissing = 64;

std::minstd_rand random_by_time() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
  return std::minstd_rand(static_cast<std::minstd_rand::result_type>(now));
}

}  // namespace

Residency::Residency(int buffered_fd) : fd_(buffered_fd) {
  ask_cachestat(0, 1);
  if (method_ == Method::kCachestat) return;
  random_ = random_by_time();
  own_probe_fd_.reset(::open(("/proc/self/fd/" + std::to_string(fd_)).c_str(), O_RDONLY | O_CLOEXEC));
  if (!own_probe_fd_) own_probe_fd_.reset(::fcntl(fd_, F_DUPFD_CLOEXEC, 0));
  probe_fd_ = own_probe_fd_.get();
  ::posix_fadvise(probe_fd_, 0, 0, POSIX_FADV_RANDOM);
}

Residency::Residency(const Residency& lender, std::minstd_rand random)
    : fd_(lender.fd_),
      method_(lender.method_),
      cachestat_error_(lender.cachestat_error_),
      probe_error_(lender.probe_error_),
      probe_fd_(lender.probe_fd_),
      random_(random) {}

Residency Residency::borrow() const {
  return Residency(*this, method_ == Method::kCachestat ? std::minstd_rand() : random_by_time());
}

bool Residency::is_trusted() const noexcept { return wrong_answers_ < kMaxWrongAnswers; }

Residency::Cached Residency::look_for(std::uint64_t offset_bytes, std::uint64_t size_bytes) {
  if (!is_trusted() || size_bytes == 0) return Cached::kNo;
  if (method_ == Method::kCachestat) return ask_cachestat(offset_bytes, size_bytes);
  return method_ == Method::kProbe && probe_one_page(offset_bytes, size_bytes) ? Cached::kAll : Cached::kNo;
}

Residency::Cached Residency::ask_cachestat(std::uint64_t offset_bytes, std::uint64_t size_bytes) {
  CachestatRange range{offset_bytes, size_bytes};
  Cachestat result{};
  if (::syscall(kSysCachestat, fd_, &range, &result, 0) != 0) {
    cachestat_error_ = errno;
    method_ = Method::kProbe;
    return Cached::kNo;
  }
  const std::uint32_t page_bytes = system_page_bytes();
  const std::uint64_t pages =
      (round_up(offset_bytes + size_bytes, page_bytes) - round_down(offset_bytes, page_bytes)) / page_bytes;
  if (result.cached_pages >= pages) return Cached::kAll;
  return result.cached_pages >= pages - pages / kFewMissing ? Cached::kMostly : Cached::kNo;
}

bool Residency::probe_one_page(std::uint64_t offset_bytes, std::uint64_t size_bytes) {
  const std::uint64_t offset = offset_bytes + std::uniform_int_distribution<std::uint64_t>(0, size_bytes - 1)(random_);
  std::byte byte{};
  const iovec vector{&byte, 1};
  const auto got = ::preadv2(probe_fd_, &vector, 1, static_cast<off_t>(offset), RWF_NOWAIT);
  if (got < 0 && errno != EAGAIN && errno != EINTR) {
    probe_error_ = errno;
    method_ = Method::kNone;
  }
  return got == 1;
}

std::string Residency::fallback_reason() const {
  if (!is_trusted()) return "page cache: chunks called cached were not, the rest was read past it";
  if (method_ == Method::kCachestat) return "";
  std::string reason = "page cache: cachestat: " + errno_code(cachestat_error_).message();
  if (method_ == Method::kProbe) return reason + ", asked by reading single pages";
  return reason + ", single pages: " + errno_code(probe_error_).message() + ", taken for not cached";
}

}  // namespace flashpack::internal
