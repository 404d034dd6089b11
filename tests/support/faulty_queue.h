#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/io_queue.h"

namespace flashpack::testing {

/// What a FaultyQueue does to reads, in percent of them.
struct Faults {
  int short_percent = 0;      ///< Whole 512-byte sectors, but fewer than asked for.
  int interrupt_percent = 0;  ///< EINTR or EAGAIN, nothing read.
  int error_percent = 0;      ///< EIO.
  int refuse_percent = 0;     ///< EINVAL, as from a file system that takes O_DIRECT at open and not at read.
};

/// Reads like a disk on a bad day: late, out of order, in part, or not at all. Everything that a direct read must
/// respect is checked: alignment of offset, size and address, one operation per tag. Targets are poisoned before they
/// are filled.
class FaultyQueue final : public engine::IoQueue {
 public:
  FaultyQueue(unsigned seed, Faults faults, std::uint32_t block_bytes = 512)
      : random_(seed), faults_(faults), block_bytes_(block_bytes) {}

  void push(unsigned tag, const engine::IoRequest& request) override {
    require(request.op == engine::IoRequest::Op::kRead, "only reads go to the disk");
    require(request.offset_bytes % block_bytes_ == 0, "offset is aligned");
    require(!request.memory.empty() && request.memory.size() % block_bytes_ == 0, "size is aligned");
    require(reinterpret_cast<std::uintptr_t>(request.memory.data()) % block_bytes_ == 0, "memory is aligned");
    require(tags_.insert(tag).second, "tag is not in flight");
    std::fill(request.memory.begin(), request.memory.end(), std::byte{0xEE});
    pending_.push_back({tag, request});
    max_in_flight_ = std::max(max_in_flight_, pending_.size());
  }

  void cancel(unsigned) override {}

  std::span<const engine::IoCompletion> wait(std::optional<std::chrono::nanoseconds> timeout) override {
    done_.clear();
    if (pending_.empty()) {
      std::unique_lock lock(mutex_);
      if (!timeout) woken_changed_.wait(lock, [this] { return woken_; });
      woken_ = false;
      return done_;
    }
    {
      const std::lock_guard lock(mutex_);
      woken_ = false;
    }
    if (timeout && chance(30)) return done_;
    const std::size_t count = 1 + random_() % pending_.size();
    for (std::size_t i = 0; i < count; ++i) {
      const auto at = pending_.begin() + static_cast<std::ptrdiff_t>(random_() % pending_.size());
      const Pending chosen = *at;
      pending_.erase(at);
      tags_.erase(chosen.tag);
      done_.push_back({chosen.tag, result_of(chosen.request)});
    }
    return done_;
  }

  void wake() noexcept override {
    {
      const std::lock_guard lock(mutex_);
      woken_ = true;
    }
    woken_changed_.notify_one();
  }

  const std::string& fallback_reason() const noexcept override { return reason_; }

  bool idle() const { return pending_.empty(); }
  std::size_t max_in_flight() const { return max_in_flight_; }
  /// Whether an error that cannot be retried has been reported.
  bool failed() const { return failed_; }

 private:
  struct Pending {
    unsigned tag;
    engine::IoRequest request;
  };

  static void require(bool holds, const char* what) {
    if (!holds) throw std::logic_error(std::string("broken rule of the disk: ") + what);
  }

  bool chance(int percent) { return static_cast<int>(random_() % 100) < percent; }

  std::int64_t result_of(const engine::IoRequest& request) {
    if (chance(faults_.interrupt_percent)) return chance(50) ? -EINTR : -EAGAIN;
    if (chance(faults_.refuse_percent)) return -EINVAL;
    if (chance(faults_.error_percent)) {
      failed_ = true;
      return -EIO;
    }
    std::size_t size = request.memory.size();
    if (size > 512 && chance(faults_.short_percent)) size = std::max<std::size_t>(512, random_() % size / 512 * 512);
    return ::pread(request.fd, request.memory.data(), size, static_cast<off_t>(request.offset_bytes));
  }

  std::mt19937_64 random_;
  const Faults faults_;
  const std::uint32_t block_bytes_;
  std::vector<Pending> pending_;
  std::vector<engine::IoCompletion> done_;
  std::set<unsigned> tags_;
  std::size_t max_in_flight_ = 0;
  bool failed_ = false;
  std::string reason_;

  std::mutex mutex_;  // Protects the rest.
  std::condition_variable woken_changed_;
  bool woken_ = false;
};

}  // namespace flashpack::testing
