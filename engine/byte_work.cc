#include "engine/byte_work.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <ctime>
#include <optional>

#include "engine/ground/mappings.h"
#include "engine/ground/pages.h"
#include "engine/ground/stream_copy.h"
#include "engine/ground/target_pages.h"
#include "engine/stripe_sums.h"

namespace flashpack::internal {

namespace {

// A file system that answers EINTR or EAGAIN for no reason must not cause an endless loop.
constexpr int kMaxInterrupts = 100;

// Gaps of up to this size are read into a buffer that is ignored, so that one system call reads several small tensors.
// A page is a bound for what is on the stack and is copied for nothing, and is not tuned.
constexpr std::size_t kSinkBytes = 4096;

// Also a bound for what is on the stack: 1 KiB of vectors. With so many fragments in a call, its cost counts for
// little.
constexpr std::size_t kMaxVectors = 64;

// Moves one whole fragment, or less at the end of the file.
std::int64_t move_fragment(int fd, const Fragment& fragment, bool write) {
  std::uint64_t done = 0;
  while (done < fragment.size_bytes) {
    const std::int64_t n =
        move_once(fd, fragment.offset_bytes + done, {fragment.memory + done, fragment.size_bytes - done}, write);
    if (n < 0) return n;
    if (n == 0) break;
    done += static_cast<std::uint64_t>(n);
  }
  return static_cast<std::int64_t>(done);
}

std::int64_t move_fragments(int fd, std::span<const Fragment> fragments, bool write) {
  std::int64_t moved = 0;
  for (const Fragment& fragment : fragments) {
    const std::int64_t n = move_fragment(fd, fragment, write);
    if (n < 0) return n;
    moved += n;
    if (static_cast<std::uint64_t>(n) < fragment.size_bytes) break;
  }
  return moved;
}

// Reads fragments that are close together with one preadv. Returns 0 if all of their bytes came, EAGAIN if fewer did,
// else an errno.
int read_together(int fd, std::span<const Fragment> run, int flags) {
  std::array<std::byte, kSinkBytes> sink;
  std::array<iovec, kMaxVectors> vectors;
  int count = 0;
  std::uint64_t end = run.front().offset_bytes;
  for (const Fragment& fragment : run) {
    if (fragment.offset_bytes > end)
      vectors[static_cast<std::size_t>(count++)] = {sink.data(), fragment.offset_bytes - end};
    vectors[static_cast<std::size_t>(count++)] = {fragment.memory, fragment.size_bytes};
    end = end_of(fragment);
  }
  const std::uint64_t begin = run.front().offset_bytes;
  const auto n = ::preadv2(fd, vectors.data(), count, static_cast<off_t>(begin), flags);
  if (n < 0) return errno;
  return n == static_cast<std::int64_t>(end - begin) ? 0 : EAGAIN;
}

std::size_t count_together(std::span<const Fragment> fragments) {
  std::size_t length = 1;
  while (length < fragments.size() && length < kMaxVectors / 2) {
    const std::uint64_t end = end_of(fragments[length - 1]);
    if (fragments[length].offset_bytes < end || fragments[length].offset_bytes - end > kSinkBytes) break;
    ++length;
  }
  return length;
}

std::int64_t sum_of(std::span<const Fragment> fragments) {
  std::int64_t sum = 0;
  for (const Fragment& fragment : fragments) sum += static_cast<std::int64_t>(fragment.size_bytes);
  return sum;
}

std::int64_t read_fragments(int fd, std::span<const Fragment> fragments) {
  std::int64_t moved = 0;
  while (!fragments.empty()) {
    const auto run = fragments.first(count_together(fragments));
    const std::int64_t wanted = sum_of(run);
    // If reading them together failed, reading each fragment alone finds out which one and why.
    const bool whole = run.size() > 1 && read_together(fd, run, 0) == 0;
    const std::int64_t n = whole ? wanted : move_fragments(fd, run, false);
    if (n < 0) return n;
    moved += n;
    if (n < wanted) break;
    fragments = fragments.subspan(run.size());
  }
  return moved;
}

// A file system that cannot tell whether a read would wait reads as usual. Other errors are left to the read that may
// wait.
std::int64_t read_cached(int fd, std::span<const Fragment> fragments) {
  const int error = read_without_waiting(fd, fragments);
  if (error == EOPNOTSUPP) return read_fragments(fd, fragments);
  return error != 0 ? -EAGAIN : sum_of(fragments);
}

std::int64_t read_as_asked(const ByteWork& work, std::span<const Fragment> fragments) {
  return work.page_cache.only ? read_cached(work.fd, fragments) : read_fragments(work.fd, fragments);
}

// Reads one fragment and counts each of its stripes at once, while the CPU's cache has it. If not all of the fragment
// comes, nothing stays counted.
std::int64_t read_and_count_stripes(const ByteWork& work, const Fragment& whole) {
  std::uint64_t done = 0;
  while (done < whole.size_bytes) {
    const std::uint64_t offset = whole.offset_bytes + done;
    const std::uint64_t end = std::min(round_up(offset + 1, Checksums::kStripeBytes), end_of(whole));
    const Fragment piece{.offset_bytes = offset, .size_bytes = end - offset, .memory = whole.memory + done};
    const std::int64_t n = read_as_asked(work, {&piece, 1});
    if (n != static_cast<std::int64_t>(piece.size_bytes)) {
      work.sums->take_back(whole.offset_bytes, {whole.memory, done});
      return n < 0 ? n : static_cast<std::int64_t>(done) + n;
    }
    work.sums->add(piece.offset_bytes, {piece.memory, piece.size_bytes});
    done += piece.size_bytes;
  }
  return static_cast<std::int64_t>(done);
}

// The bytes of a gap are not counted, so that no stripe beside it can be complete. The part of such a stripe is left
// out.
void count_between_gaps(std::span<const Fragment> fragments, StripeSums& sums) {
  constexpr std::uint64_t kStripeBytes = Checksums::kStripeBytes;
  for (std::size_t i = 0; i < fragments.size(); ++i) {
    const bool gap_before = i > 0 && end_of(fragments[i - 1]) < fragments[i].offset_bytes;
    const bool gap_after = i + 1 < fragments.size() && end_of(fragments[i]) < fragments[i + 1].offset_bytes;
    const std::uint64_t begin = fragments[i].offset_bytes;
    const std::uint64_t from = gap_before ? round_up(begin, kStripeBytes) : begin;
    const std::uint64_t to = gap_after ? round_down(end_of(fragments[i]), kStripeBytes) : end_of(fragments[i]);
    if (from < to) sums.add(from, {fragments[i].memory + (from - begin), to - from});
  }
}

// Chunks of several fragments, which are those of many small tensors on the host, are counted when all of them has
// come.
std::int64_t read_and_count(const ByteWork& work) {
  const std::span<const Fragment> fragments = work.fragments;
  if (fragments.size() == 1) return read_and_count_stripes(work, fragments.front());
  const std::int64_t moved = read_as_asked(work, fragments);
  if (moved == sum_of(fragments)) count_between_gaps(fragments, *work.sums);
  return moved;
}

std::int64_t read_through_cache(const ByteWork& work) {
  const std::span<const Fragment> fragments = work.fragments;
  const std::int64_t moved = work.sums ? read_and_count(work) : read_as_asked(work, fragments);
  if (work.page_cache.drop && moved > 0) {
    const std::uint64_t begin = fragments.front().offset_bytes;
    const std::uint64_t end = end_of(fragments.back());
    ::posix_fadvise(work.fd, static_cast<off_t>(begin), static_cast<off_t>(end - begin), POSIX_FADV_DONTNEED);
  }
  return moved;
}

std::chrono::nanoseconds cpu_time_of_thread() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

// Takes the page faults of `memory`. Returns 0, or an errno, after which a read into that memory may still succeed.
int populate(std::span<std::byte> memory, bool for_writing, [[maybe_unused]] PagePolicy* policy) {
#ifdef MADV_POPULATE_WRITE
  // Pages that `memory` covers only in part are included.
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(memory.data());
  const std::size_t before = address % system_page_bytes();
  const int advice = for_writing ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
  const auto begin = cpu_time_of_thread();
  const int error = ::madvise(memory.data() - before, before + memory.size(), advice) == 0 ? 0 : errno;
  if (for_writing && policy) policy->was_touched(memory, cpu_time_of_thread() - begin);
  return error;
#else
  return ENOSYS;
#endif
}

// Some sandboxes that imitate Linux (gVisor) lack MADV_POPULATE. This is asked at once, because a fork during a first
// call by another thread would leave the child waiting for the end of that call.
bool can_populate() {
  static const bool can = [] {
    std::byte here{};
    return populate({&here, 1}, true, nullptr) == 0;
  }();
  return can;
}
[[maybe_unused]] const bool asked_at_once = can_populate();

// The errno of a read into `memory`, after populating it has failed with `error`. To populate fails with ENOMEM also
// where nothing is mapped, and with EINVAL where the mapping does not allow it; a read says EFAULT for both. A lack of
// memory and a page that is broken (EHWPOISON) are no fault of the address.
int as_read_fails(int error, std::span<std::byte> memory) {
  const auto is_mapped = [memory] { return ::msync(memory.data(), memory.size(), MS_ASYNC) == 0 || errno != ENOMEM; };
  return error == EINVAL || (error == ENOMEM && !is_mapped()) ? EFAULT : error;
}

// Whether all pages of `memory` are there. Empty if the kernel does not tell.
std::optional<bool> are_present(std::span<std::byte> memory) {
  const std::size_t page_bytes = system_page_bytes();
  const std::size_t before = reinterpret_cast<std::uintptr_t>(memory.data()) % page_bytes;
  memory = {memory.data() - before, before + memory.size()};
  std::array<unsigned char, 1024> pages;
  while (!memory.empty()) {
    const auto part = memory.first(std::min(memory.size(), pages.size() * page_bytes));
    if (::mincore(part.data(), part.size(), pages.data()) != 0)
      return errno == ENOMEM ? std::optional(false) : std::nullopt;
    const auto end = pages.begin() + static_cast<std::ptrdiff_t>((part.size() + page_bytes - 1) / page_bytes);
    if (!std::all_of(pages.begin(), end, [](unsigned char flags) { return flags & 1; })) return false;
    memory = memory.subspan(part.size());
  }
  return true;
}

// Whether the page in the middle is populated. If not, the memory is fresh. The first page and the last tell nothing,
// because they may have bytes of other chunks.
bool is_middle_populated(std::span<std::byte> memory) { return is_populated(memory.subspan(memory.size() / 2, 1)); }

// Whether a copy from whole pages needs no populate. No file can take bytes of anonymous memory away, and what the
// kernel shows of such memory as absent is populated all the same: it may be fresh, swapped out, or a guard
// (MADV_GUARD_INSTALL), whose bytes nobody may read. A page that is broken (EHWPOISON) or barred by a protection key is
// shown as present, so that the copy ends the process, as any other look at that page does. To ask about 4 MiB costs a
// fifteenth of populating small pages, and 7 us more than populating huge ones (engine_bench, cost/touchable).
bool may_be_copied(std::span<std::byte> run, Mappings& mappings) {
  // To populate fewer bytes takes as long as to ask. A bound, and not tuned.
  constexpr std::size_t kLeastAskedBytes = 256 << 10;
  return run.size() >= kLeastAskedBytes && mappings.are_anonymous_and_readable(run) && are_present(run).value_or(false);
}

// Populates the caller's memory before it is copied to, and before it is copied from where that is needed. A copy to
// memory that is not mapped, not writable or has no page left would end the process, whereas a failed populate is only
// an error, as EFAULT is for a read. On small pages that are present, this may cost as much as the copy, on huge ones
// nothing, and fresh pages it populates faster than the copy would. process_vm_writev(2) costs more (engine_bench,
// cost/touchable and cost/fresh_copy), and some containers forbid it.
std::int64_t make_touchable(std::span<const Fragment> fragments, bool for_writing, PagePolicy* policy) {
  Mappings mappings;
  std::span<std::byte> run;  // Whole pages that follow on each other.
  const auto ask = [&] {
    if (run.empty() || (!for_writing && may_be_copied(run, mappings))) return 0;
    // Pages that are there already tell nothing about fresh ones.
    const bool fresh = policy && !is_middle_populated(run);
    return as_read_fails(populate(run, for_writing, fresh ? policy : nullptr), run);
  };
  if (!can_populate()) return 0;
  for (const Fragment& fragment : fragments) {
    std::byte* const begin = fragment.memory - reinterpret_cast<std::uintptr_t>(fragment.memory) % system_page_bytes();
    const auto size =
        round_up(static_cast<std::uint64_t>(fragment.memory + fragment.size_bytes - begin), system_page_bytes());
    std::byte* const end = begin + size;
    if (begin >= run.data() && begin <= run.data() + run.size()) {
      run = {run.data(), std::max(end, run.data() + run.size())};
      continue;
    }
    if (const int error = ask()) return -error;
    run = {begin, end};
  }
  return -ask();
}

// Page faults during a copy to fresh memory cost more than populating it first (engine_bench, cost/fresh_copy).
void populate_if_fresh(std::span<const Fragment> fragments, PagePolicy* policy) {
  for (const Fragment& fragment : fragments) {
    const std::span<std::byte> memory(fragment.memory, fragment.size_bytes);
    if (memory.size() < kHugePageBytes) continue;  // It tells nothing about huge pages, and populates few small ones.
    if (!is_middle_populated(memory)) populate(memory, true, policy);
  }
}

std::int64_t scatter(const ByteWork& work) {
  if (const auto error = make_touchable(work.fragments, true, work.page_policy)) return error;
  for (const Fragment& fragment : work.fragments)
    stream_copy(fragment.memory, work.view.of(fragment), fragment.size_bytes);
  return 0;
}

std::int64_t gather(const ByteWork& work) {
  if (const auto error = make_touchable(work.fragments, false, work.page_policy)) return error;
  clear_gaps(work.view, work.fragments);
  for (const Fragment& fragment : work.fragments)
    stream_copy(work.view.of(fragment), fragment.memory, fragment.size_bytes);
  return 0;
}

// Counts the view's bytes from the first fragment to the last.
void count_view(const ByteWork& work) {
  const std::uint64_t begin = work.fragments.front().offset_bytes;
  const std::uint64_t end = end_of(work.fragments.back());
  work.sums->add(begin, work.view.between(begin, end));
}

void count(const ByteWork& work, std::int64_t result) {
  if (result < 0) return;
  switch (work.op) {
    case ByteWork::Op::kToCache:
      if (result != sum_of(work.fragments)) return;
      [[fallthrough]];
    case ByteWork::Op::kGather:
      for (const Fragment& fragment : work.fragments)
        work.sums->add(fragment.offset_bytes, {fragment.memory, fragment.size_bytes});
      return;
    case ByteWork::Op::kScatter:
    case ByteWork::Op::kChecksum:
      return count_view(work);
    case ByteWork::Op::kFromCache:  // It has counted what it has read.
    case ByteWork::Op::kPopulate:
      return;
  }
}

std::int64_t move_bytes(const ByteWork& work) {
  const bool for_writing = work.touch == ByteWork::Touch::kForWriting;
  switch (work.op) {
    case ByteWork::Op::kFromCache:
      populate_if_fresh(work.fragments, work.page_policy);
      return read_through_cache(work);
    case ByteWork::Op::kToCache:
      return move_fragments(work.fd, work.fragments, true);
    case ByteWork::Op::kScatter:
      return scatter(work);
    case ByteWork::Op::kGather:
      return gather(work);
    case ByteWork::Op::kChecksum:
      return work.touch == ByteWork::Touch::kNothing ? 0
                                                     : make_touchable(work.fragments, for_writing, work.page_policy);
    case ByteWork::Op::kPopulate:
      populate(work.view.bytes, for_writing, work.page_policy);
      return 0;
  }
  return -EINVAL;
}

}  // namespace

std::int64_t carry_out(const ByteWork& work) {
  const std::int64_t result = move_bytes(work);
  if (work.sums) count(work, result);
  return result;
}

std::int64_t move_once(int fd, std::uint64_t offset_bytes, std::span<std::byte> memory, bool write) {
  const auto offset = static_cast<off_t>(offset_bytes);
  for (int attempt = 0;; ++attempt) {
    const auto result =
        write ? ::pwrite(fd, memory.data(), memory.size(), offset) : ::pread(fd, memory.data(), memory.size(), offset);
    if (result >= 0) return result;
    if ((errno != EINTR && errno != EAGAIN) || attempt == kMaxInterrupts) return -errno;
  }
}

int read_without_waiting(int fd, std::span<const Fragment> fragments) {
  while (!fragments.empty()) {
    const auto run = fragments.first(count_together(fragments));
    if (const int error = read_together(fd, run, RWF_NOWAIT)) return error;
    fragments = fragments.subspan(run.size());
  }
  return 0;
}

void clear_gaps(const ChunkView& view, std::span<const Fragment> fragments) {
  std::uint64_t at = view.offset_bytes;
  const auto clear_to = [&](std::uint64_t end) { std::ranges::fill(view.between(at, end), std::byte{}); };
  for (const Fragment& fragment : fragments) {
    clear_to(fragment.offset_bytes);
    at = end_of(fragment);
  }
  clear_to(view.end_bytes());
}

bool is_populated(std::span<std::byte> memory) { return are_present(memory).value_or(true); }

}  // namespace flashpack::internal
