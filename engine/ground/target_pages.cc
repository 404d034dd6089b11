#include "engine/ground/target_pages.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>

#include "engine/ground/error.h"
#include "engine/ground/host_region.h"
#include "engine/ground/pages.h"

namespace flashpack::internal {

namespace {

using std::chrono::milliseconds;

// Huge pages are used as long as they cost little more than small ones.
//
// To populate 2 MiB takes 1.1 ms in small pages and 0.4 ms in one huge page (engine_bench, cost/first_touch). If the
// host of a virtual machine has to provide the huge page, it takes 2 to 9 ms (bench/README.md, "the driver takes the
// faults").
constexpr std::chrono::nanoseconds kFairPerHugePage = milliseconds(1);
// Each huge page adds the time that it took above the fair time to a sum, or takes the time below it off. Huge pages
// are given up when the sum reaches kTooMuch, so that a few dear pages among many cheap ones change nothing. The sum
// stays below kMostExcess, so that a few cheap pages are enough to go back to huge ones, however dear the earlier ones
// were: four of 0.4 ms bring the sum from there to below kTooMuch. Both are bounds and not tuned.
constexpr std::chrono::nanoseconds kTooMuch = milliseconds(10);
constexpr std::chrono::nanoseconds kMostExcess = milliseconds(12);

// Where huge pages were dear, they are tried again once in so many bytes of fresh memory. A try that fails costs
// kTooMuch, in which 19 MiB of small pages can be populated. That is a fiftieth of what these bytes cost. A bound, and
// not tuned.
constexpr std::uint64_t kRetryBytes = std::uint64_t{1} << 30;
// In less memory, chunks may touch no whole huge page, which would tell nothing.
constexpr std::uint64_t kLeastTryBytes = 4 * kHugePageBytes;

// Before Linux 5.18, the kernel may take a page that it was told is free while direct I/O writes to it, and the bytes
// are lost.
bool kernel_keeps_direct_reads() {
  utsname name{};
  int major = 0;
  int minor = 0;
  if (::uname(&name) != 0 || std::sscanf(name.release, "%d.%d", &major, &minor) != 2) return false;
  return major > 5 || (major == 5 && minor >= 18);
}

// Where the address space is limited, kept pages take room that the program needs for something else. It may set the
// limit at any time.
bool address_space_is_free() {
  rlimit limit{};
  return ::getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur == RLIM_INFINITY;
}

// Where the kernel limits the memory that it promises, kept pages count as promised, so that other memory is refused.
bool promises_are_free() {
  char overcommit = '2';
  std::ifstream("/proc/sys/vm/overcommit_memory") >> overcommit;
  return overcommit != '2';
}

// This is asked while the program is loaded. A fork during a first call by another thread would leave the child waiting
// for the end of that call.
const bool may_keep = kernel_keeps_direct_reads() && promises_are_free();

std::span<std::byte> map(std::size_t size_bytes) {
  const std::span memory = map_memory(size_bytes, kHugePageBytes);
  if (memory.empty()) throw map_error(size_bytes, "tensors");
  return memory;
}

}  // namespace

TargetPages::~TargetPages() {
  if (owner_.is_current()) {
    release_kept();
  } else {  // Another thread of the parent may have been changing them at the fork.
    detail::leave_to_parent(used_);
    detail::leave_to_parent(kept_);
  }
}

std::span<std::byte> TargetPages::take(std::size_t before_bytes, std::size_t size_bytes) {
  const std::size_t pages_bytes = round_up(before_bytes + size_bytes, kHugePageBytes);
  if (!owner_.is_current()) {
    const std::span memory = map(pages_bytes);
    advise_huge_pages(memory.subspan(before_bytes, size_bytes));
    return memory;
  }
  const std::lock_guard lock(mutex_);
  // It is made first, because there may be no memory for it later.
  auto entry = std::map<std::byte*, Used>{{nullptr, {{pages_bytes, false}, false}}}.extract(nullptr);
  std::span<std::byte> memory = take_kept(entry.mapped());
  if (memory.empty()) memory = take_fresh(before_bytes, size_bytes, entry.mapped());
  entry.key() = memory.data();
  used_.insert(std::move(entry));
  used_bytes_ += pages_bytes;
  most_used_bytes_ = std::max(most_used_bytes_, used_bytes_);
  drop_kept(most_used_bytes_ - used_bytes_);
  return memory;
}

std::span<std::byte> TargetPages::take_fresh(std::size_t before_bytes, std::size_t size_bytes, Used& used) {
  std::span<std::byte> memory = map_memory(used.size_bytes, kHugePageBytes);
  if (memory.empty()) {
    drop_kept(0);
    memory = map(used.size_bytes);
  }
  used.may_get_huge_pages = choose_huge_pages(used.size_bytes);
  used.has_small_pages = !used.may_get_huge_pages;
  if (used.may_get_huge_pages) {
    advise_huge_pages(memory.subspan(before_bytes, size_bytes));
  } else {
    ::madvise(memory.data(), memory.size(), MADV_NOHUGEPAGE);
  }
  return memory;
}

// Counts fresh memory, and decides whether it gets huge pages.
bool TargetPages::choose_huge_pages(std::size_t size_bytes) {
  untried_bytes_ += size_bytes;
  const bool may = excess_ < kTooMuch || (untried_bytes_ >= kRetryBytes && size_bytes >= kLeastTryBytes);
  if (may) untried_bytes_ = 0;
  return may;
}

// The smallest range that is large enough serves, so that large ones stay whole.
std::span<std::byte> TargetPages::take_kept(Used& used) {
  const std::size_t size_bytes = used.size_bytes;
  auto best = kept_.end();
  for (auto range = kept_.begin(); range != kept_.end(); ++range) {
    const std::size_t range_bytes = range->second.size_bytes;
    if (range_bytes >= size_bytes && (best == kept_.end() || range_bytes < best->second.size_bytes)) best = range;
  }
  if (best == kept_.end()) return {};
  const auto [begin, kept] = *best;
  if (kept.size_bytes > size_bytes)
    kept_.emplace_hint(std::next(best), begin + size_bytes, Kept{kept.size_bytes - size_bytes, kept.has_small_pages});
  kept_.erase(best);
  kept_bytes_ -= size_bytes;
  used.has_small_pages = kept.has_small_pages;
  if (::madvise(begin, size_bytes, MADV_DOFORK) == 0) return {begin, size_bytes};
  unmap({begin, size_bytes});  // A process with as many mappings as it may have cannot get them back for its children.
  return {};
}

void TargetPages::give_back(std::span<std::byte> memory) noexcept {
  if (!owner_.is_current()) return unmap(memory);
  // From now on the kernel may take these pages until they are written again. It refuses if they are locked.
  const bool is_free = may_keep && address_space_is_free() && ::madvise(memory.data(), memory.size(), MADV_FREE) == 0;
  const std::lock_guard lock(mutex_);
  const bool has_small_pages = used_.extract(memory.data()).mapped().has_small_pages;
  used_bytes_ -= memory.size();
  std::error_code out_of_memory;
  if (is_free) catching(out_of_memory, [&] { keep(memory, has_small_pages); });
  if (!is_free || out_of_memory) unmap(memory);
}

void TargetPages::keep(std::span<std::byte> memory, bool has_small_pages) {
  // A child would share the pages, and then to write to them would cost more than fresh ones do.
  if (::madvise(memory.data(), memory.size(), MADV_DONTFORK) != 0) return unmap(memory);
  auto range = kept_.emplace(memory.data(), Kept{memory.size(), has_small_pages}).first;
  kept_bytes_ += memory.size();
  const auto is_one_with = [](const auto& before, const auto& next) {
    return before.first + before.second.size_bytes == next.first &&
           before.second.has_small_pages == next.second.has_small_pages;
  };
  if (const auto next = std::next(range); next != kept_.end() && is_one_with(*range, *next)) {
    range->second.size_bytes += next->second.size_bytes;
    kept_.erase(next);
  }
  if (range == kept_.begin()) return;
  if (const auto before = std::prev(range); is_one_with(*before, *range)) {
    before->second.size_bytes += range->second.size_bytes;
    kept_.erase(range);
  }
}

void TargetPages::drop_kept(std::uint64_t limit_bytes) noexcept {
  while (kept_bytes_ > limit_bytes) {
    const auto last = std::prev(kept_.end());
    std::size_t& size_bytes = last->second.size_bytes;
    const std::uint64_t excess = std::min<std::uint64_t>(size_bytes, kept_bytes_ - limit_bytes);
    size_bytes -= excess;
    kept_bytes_ -= excess;
    unmap({last->first + size_bytes, excess});
    if (size_bytes == 0) kept_.erase(last);
  }
}

void TargetPages::was_touched(std::span<const std::byte> memory, std::chrono::nanoseconds cpu_time) noexcept {
  const auto huge_pages = static_cast<std::int64_t>(memory.size() / kHugePageBytes);
  if (huge_pages == 0 || !owner_.is_current()) return;
  const std::lock_guard lock(mutex_);
  const std::byte* const end = memory.data() + memory.size();
  auto* const found = find(end - 1);
  if (!found || !found->second.may_get_huge_pages) return;
  auto& [begin, used] = *found;
  const std::chrono::nanoseconds unfair = cpu_time - huge_pages * kFairPerHugePage;
  excess_ = std::clamp(excess_ + unfair, std::chrono::nanoseconds::zero(), kMostExcess);
  if (unfair <= std::chrono::nanoseconds::zero() || excess_ < kTooMuch) return;
  used.may_get_huge_pages = false;
  used.has_small_pages = true;
  const std::uint64_t touched_bytes = round_up(static_cast<std::uint64_t>(end - begin), kHugePageBytes);
  if (touched_bytes < used.size_bytes)
    ::madvise(begin + touched_bytes, used.size_bytes - touched_bytes, MADV_NOHUGEPAGE);
}

bool TargetPages::has_small_pages(const std::byte* address) noexcept {
  if (!owner_.is_current()) return false;
  // The driver asks, and must not wait for a thread that gives back memory meanwhile.
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return false;
  const auto* const found = find(address);
  return found && found->second.has_small_pages;
}

std::pair<std::byte* const, TargetPages::Used>* TargetPages::find(const std::byte* address) {
  auto range = used_.upper_bound(const_cast<std::byte*>(address));
  if (range == used_.begin()) return nullptr;
  --range;
  return address < range->first + range->second.size_bytes ? &*range : nullptr;
}

std::uint64_t TargetPages::kept_bytes() noexcept {
  if (!owner_.is_current()) return 0;
  const std::lock_guard lock(mutex_);
  return kept_bytes_;
}

void TargetPages::release_kept() noexcept {
  if (!owner_.is_current()) return;
  const std::lock_guard lock(mutex_);
  drop_kept(0);
}

}  // namespace flashpack::internal
