/// Says which parts of an open file are in the page cache.
#pragma once

#include <cstdint>
#include <random>
#include <string>

#include "engine/ground/unique_fd.h"

namespace flashpack::internal {

/// Asks cachestat(2) where the kernel allows it: since Linux 6.5, for files that the caller owns or may write.
/// Otherwise it reads one page of the range without waiting for the disk. If that page is not cached, the kernel starts
/// to read it and keeps it. Therefore only one page is read, without readahead, and at a random offset; at a fixed
/// one, the second load of a cold file would find the page cached and take the whole file for cached.
///
/// Any answer may be out of date at once, and one page says nothing about its neighbours. Therefore the caller must
/// read a range that is called cached (kAll) without waiting, and call report_wrong() if the range was not cached. A
/// range that is mostly cached is read with waiting, because it needs the disk anyway; if its pages have gone
/// meanwhile, all of it comes from the disk through the page cache.
///
/// borrow(), look_for() and report_wrong() do this, and the other functions tell what they have found.
///
/// Move-only. Thread safety: one thread. borrow() is for any thread if nobody asks for ranges meanwhile.
class Residency {
 public:
  enum class Method : std::uint8_t { kCachestat, kProbe, kNone };

  /// Borrows the descriptor of a regular file or block device, open for reading through the page cache. May block,
  /// because without cachestat(2) the file is opened once more.
  explicit Residency(int buffered_fd);
  /// Returns a Residency for the same file that need not find out how to ask, and borrows the descriptors, which must
  /// stay open. Opens nothing.
  Residency borrow() const;

  /// How much of a range seems to be in the page cache.
  enum class Cached : std::uint8_t {
    kNo,
    kMostly,  ///< Some is missing, but at most a 64th. Only cachestat(2) finds that.
    kAll,
  };
  /// kNo if the kernel does not tell.
  Cached look_for(std::uint64_t offset_bytes, std::uint64_t size_bytes);
  /// Whether all of the range seems to be there.
  bool seems_cached(std::uint64_t offset_bytes, std::uint64_t size_bytes) {
    return look_for(offset_bytes, size_bytes) == Cached::kAll;
  }

  /// To be called when a range that was called cached was not. After a few such calls nothing is called cached any
  /// more.
  void report_wrong() { ++wrong_answers_; }
  /// Whether the answers so far have been right often enough.
  bool is_trusted() const noexcept;

  /// How the kernel is asked; kNone if it cannot be.
  Method method() const noexcept { return method_; }
  /// Why the answers are less reliable than those of cachestat(2); empty when they are not.
  std::string fallback_reason() const;

 private:
  Residency(const Residency& lender, std::minstd_rand random);
  Cached ask_cachestat(std::uint64_t offset_bytes, std::uint64_t size_bytes);
  bool probe_one_page(std::uint64_t offset_bytes, std::uint64_t size_bytes);

  int fd_;
  Method method_ = Method::kCachestat;
  int cachestat_error_ = 0;
  int probe_error_ = 0;
  unsigned wrong_answers_ = 0;
  int probe_fd_ = -1;  // A separate descriptor, because advice against readahead is for all reads through one.
  UniqueFd own_probe_fd_;
  std::minstd_rand random_;
};

}  // namespace flashpack::internal
