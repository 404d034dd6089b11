/// What of an open file is in the page cache.
#pragma once

#include <cstdint>
#include <random>
#include <string>

#include "engine/unique_fd.h"

namespace flashpack::internal {

/// Answers by cachestat(2) where the kernel allows it: since Linux 6.5, for files that the caller owns or may write.
/// Elsewhere by reading one page of the range without waiting for the disk. Such a look starts the read of a page that
/// is not there, which stays: hence one page only, without readahead, and another one each time, or the second load of
/// a cold file would find every page cached that is asked for.
///
/// Any answer may be out of date at once, and a looked-at page says nothing about its neighbours. So what is called
/// cached must be read in a way that notices when it is not, and the liar reported here.
///
/// Move-only. Thread safety: one thread.
class Residency {
 public:
  enum class Method : std::uint8_t { kCachestat, kProbe, kNone };

  /// Borrows the descriptor of a regular file, open for reading through the page cache. May block, where the file has
  /// to be opened once more for the other way to ask.
  explicit Residency(int buffered_fd);

  /// Whether the range seems to be in the page cache. No where the kernel will not say.
  bool cached(std::uint64_t offset_bytes, std::uint64_t size_bytes);

  /// What was called cached was not. After a few of these nothing is called cached any more.
  void report_wrong() { ++wrong_answers_; }

  Method method() const noexcept { return method_; }
  /// Why the answers are worse than cachestat's; empty when they are not.
  std::string fallback_reason() const;

 private:
  bool counted(std::uint64_t offset_bytes, std::uint64_t size_bytes);
  bool probed(std::uint64_t offset_bytes, std::uint64_t size_bytes);

  int fd_;
  Method method_ = Method::kCachestat;
  int cachestat_error_ = 0;
  int probe_error_ = 0;
  unsigned wrong_answers_ = 0;
  UniqueFd probe_fd_;  // Opened for itself, because the advice against readahead holds for all users of a descriptor.
  std::minstd_rand random_;
};

}  // namespace flashpack::internal
