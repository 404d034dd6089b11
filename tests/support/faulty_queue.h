#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <limits>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/io_queue.h"
#include "engine/workers.h"
#include "tests/support/bulk.h"
#include "tests/support/counted_new.h"

namespace flashpack::testing {

/// What a FaultyQueue does to operations, in percent of them. Those of direct I/O:
struct Faults {
  int short_percent = 0;      ///< Whole 512-byte sectors, but fewer than asked for.
  int interrupt_percent = 0;  ///< EINTR or EAGAIN, nothing moved.
  int error_percent = 0;      ///< EIO; of buffered reads and writes, too.
  int refuse_percent = 0;     ///< EINVAL or EOPNOTSUPP, as from a file system that takes O_DIRECT at open and no later.
  int nothing_percent = 0;    ///< Zero bytes, as past the end of the file; of buffered reads, too.
  int uncached_percent = 0;   ///< Of buffered reads that must not wait for the disk: they would have to.
};

/// Carries out operations, those of direct I/O or byte work, like a disk on a bad day: late, out of order, in part, or
/// not at all. Everything that a direct operation must respect is checked: alignment of offset, size and address, one
/// operation per tag. Memory that an operation may write is poisoned before it does.
template <class Interface>
class FaultyQueue final : public Interface {
 public:
  using Request = typename Interface::Request;

  /// `listener` is the queue that the owner sleeps in, when that is another one.
  FaultyQueue(unsigned seed, Faults faults, internal::Queue* listener = nullptr)
      : random_(seed), faults_(faults), listener_(listener) {}

  void push(unsigned tag, const Request& request) override {
    const NotCounted not_counted;
    check_and_poison(request);
    require(pending_.emplace(tag, Pending{request}).second, "tag is not in flight");
    max_in_flight_ = std::max(max_in_flight_, pending_.size());
    if (listener_) listener_->wake();
  }

  void cancel(unsigned tag) override {
    const auto found = pending_.find(tag);
    if (found != pending_.end()) found->second.cancelled = true;
  }

  std::span<const internal::IoCompletion> wait(std::optional<std::chrono::nanoseconds> timeout) override {
    const NotCounted not_counted;
    done_.clear();
    {
      std::unique_lock lock(mutex_);
      const auto woken = [this] { return woken_; };
      if (stuck() && timeout && timeout->count() > 0) woken_changed_.wait_for(lock, *timeout, woken);
      if (stuck() && !timeout) woken_changed_.wait(lock, woken);
      woken_ = false;
    }
    if (!stuck() && !(timeout && chance(30))) {
      for (std::size_t count = 1 + random_() % pending_.size(); count > 0 && !stuck(); --count) finish_one();
    }
    if (listener_ && !stuck()) listener_->wake();
    const auto hangs = [this](const auto& entry) { return is_stuck(entry.second); };
    if (std::any_of(pending_.begin(), pending_.end(), hangs)) ++hangs_;
    return done_;
  }

  void wake() noexcept override {
    {
      const std::lock_guard lock(mutex_);
      woken_ = true;
    }
    woken_changed_.notify_one();
  }

  /// Any thread: reads and writes at or past that offset do not come back, cancelled or not, until this is raised.
  void get_stuck_from(std::uint64_t offset_bytes) {
    stuck_from_bytes_ = offset_bytes;
    wake();
    if (listener_) listener_->wake();
  }

  /// Any thread: operations on the byte at that offset of a file give EIO.
  void fail_at(std::uint64_t offset_bytes) { fails_at_bytes_ = offset_bytes; }

  bool idle() const { return pending_.empty(); }
  std::size_t max_in_flight() const { return max_in_flight_; }
  /// How often something was waited for while an operation hung.
  std::size_t hangs() const { return hangs_; }

 private:
  static constexpr std::uint32_t kBlockBytes = 512;
  static constexpr std::byte kPoison{0xEE};

  struct Pending {
    Request request;
    bool cancelled = false;
  };

  static void require(bool holds, const char* what) {
    if (!holds) throw std::logic_error(std::string("broken rule of the queue: ") + what);
  }

  bool chance(int percent) { return static_cast<int>(random_() % 100) < percent; }

  static void check_and_poison(const internal::DiskRequest& request) {
    require(request.offset_bytes % kBlockBytes == 0, "offset is aligned");
    require(!request.memory.empty() && request.memory.size() % kBlockBytes == 0, "size is aligned");
    require(reinterpret_cast<std::uintptr_t>(request.memory.data()) % kBlockBytes == 0, "memory is aligned");
    if (request.op == internal::DiskRequest::Op::kRead)
      fill_bytes(request.memory.data(), kPoison, request.memory.size());
  }
  static void check_and_poison(const internal::ByteWork& work) {
    if (work.op != internal::ByteWork::Op::kFromCache) return;
    for (const internal::Fragment& fragment : work.fragments) fill_bytes(fragment.memory, kPoison, fragment.size_bytes);
  }

  static bool touches_file(const internal::DiskRequest&) { return true; }
  static bool touches_file(const internal::ByteWork& work) { return work.fd >= 0; }
  static std::uint64_t offset_of(const internal::DiskRequest& request) { return request.offset_bytes; }
  static std::uint64_t offset_of(const internal::ByteWork& work) { return work.fragments.front().offset_bytes; }
  static bool holds(const internal::DiskRequest& request, std::uint64_t offset_bytes) {
    return offset_bytes >= request.offset_bytes && offset_bytes - request.offset_bytes < request.memory.size();
  }
  static bool holds(const internal::ByteWork& work, std::uint64_t offset_bytes) {
    return touches_file(work) && std::ranges::any_of(work.fragments, [&](const internal::Fragment& fragment) {
             return offset_bytes >= fragment.offset_bytes && offset_bytes < internal::end_of(fragment);
           });
  }
  bool is_stuck(const Pending& pending) const {
    return touches_file(pending.request) && offset_of(pending.request) >= stuck_from_bytes_;
  }
  // Nothing is pending that may come back.
  bool stuck() const {
    return std::all_of(pending_.begin(), pending_.end(), [this](const auto& entry) { return is_stuck(entry.second); });
  }

  // Requires: !stuck().
  void finish_one() {
    auto at = std::next(pending_.begin(), static_cast<std::ptrdiff_t>(random_() % pending_.size()));
    while (is_stuck(at->second)) at = std::next(at) == pending_.end() ? pending_.begin() : std::next(at);
    const auto [tag, chosen] = *at;
    pending_.erase(at);
    const bool cancelled = chosen.cancelled && chance(50);
    const std::int64_t failed = cancelled ? -ECANCELED : holds(chosen.request, fails_at_bytes_) ? -EIO : 0;
    done_.push_back({tag, failed != 0 ? failed : result_of(chosen.request)});
  }

  std::int64_t result_of(internal::DiskRequest request) {
    if (chance(faults_.interrupt_percent)) return chance(50) ? -EINTR : -EAGAIN;
    if (chance(faults_.refuse_percent)) return chance(50) ? -EINVAL : -EOPNOTSUPP;
    if (chance(faults_.error_percent)) return -EIO;
    if (chance(faults_.nothing_percent)) return 0;
    if (const auto sectors = request.memory.size() / 512; sectors > 1 && chance(faults_.short_percent)) {
      request.memory = request.memory.first((1 + random_() % (sectors - 1)) * 512);
    }
    return internal::carry_out(request);
  }
  std::int64_t result_of(const internal::ByteWork& work) {
    const bool reads = work.op == internal::ByteWork::Op::kFromCache;
    if (reads && work.page_cache.only && chance(faults_.uncached_percent)) return -EAGAIN;
    if (reads && chance(faults_.nothing_percent)) return 0;
    if (touches_file(work) && chance(faults_.error_percent)) return -EIO;
    return internal::carry_out(work);
  }

  std::mt19937_64 random_;
  const Faults faults_;
  internal::Queue* const listener_;
  std::map<unsigned, Pending> pending_;
  std::atomic<std::uint64_t> stuck_from_bytes_ = std::numeric_limits<std::uint64_t>::max();
  std::atomic<std::uint64_t> fails_at_bytes_ = std::numeric_limits<std::uint64_t>::max();
  std::vector<internal::IoCompletion> done_;
  std::size_t max_in_flight_ = 0;
  std::size_t hangs_ = 0;

  std::mutex mutex_;  // Protects the rest.
  std::condition_variable woken_changed_;
  bool woken_ = false;
};

}  // namespace flashpack::testing
