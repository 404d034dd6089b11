#include "engine/workers.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>
#include <cstring>

#include "engine/page_size.h"
#include "engine/stripe_sums.h"

namespace flashpack::internal {

namespace {

// EINTR and EAGAIN without a cause of ours come from odd file systems; they must not become an endless loop.
constexpr int kMaxInterrupts = 100;

// Gaps up to this are read into a sink, so that neighbouring small tensors are one system call.
constexpr std::size_t kSinkBytes = 4096;

constexpr std::size_t kMaxVectors = 64;

template <class Syscall>
std::int64_t retry_interrupted(Syscall call) {
  for (int attempt = 0;; ++attempt) {
    const auto result = call();
    if (result >= 0) return result;
    if ((errno != EINTR && errno != EAGAIN) || attempt == kMaxInterrupts) return -errno;
  }
}

// Moves all of one fragment; less only at the end of the file.
std::int64_t move_fragment(int fd, const Fragment& fragment, bool write) {
  std::uint64_t done = 0;
  while (done < fragment.size_bytes) {
    const auto offset = static_cast<off_t>(fragment.offset_bytes + done);
    const std::int64_t n = retry_interrupted([&] {
      return write ? ::pwrite(fd, fragment.memory + done, fragment.size_bytes - done, offset)
                   : ::pread(fd, fragment.memory + done, fragment.size_bytes - done, offset);
    });
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

// One preadv over fragments that are close together. 0 when every byte of them came, else an errno; EAGAIN when fewer
// did.
int read_run(int fd, std::span<const Fragment> run, int flags) {
  std::array<std::byte, kSinkBytes> sink;
  std::array<iovec, kMaxVectors> vectors;
  int count = 0;
  std::uint64_t end = run.front().offset_bytes;
  for (const Fragment& fragment : run) {
    if (fragment.offset_bytes > end)
      vectors[static_cast<std::size_t>(count++)] = {sink.data(), fragment.offset_bytes - end};
    vectors[static_cast<std::size_t>(count++)] = {fragment.memory, fragment.size_bytes};
    end = fragment.offset_bytes + fragment.size_bytes;
  }
  const std::uint64_t begin = run.front().offset_bytes;
  const auto n = ::preadv2(fd, vectors.data(), count, static_cast<off_t>(begin), flags);
  if (n < 0) return errno;
  return n == static_cast<std::int64_t>(end - begin) ? 0 : EAGAIN;
}

std::size_t run_length(std::span<const Fragment> fragments) {
  std::size_t length = 1;
  while (length < fragments.size() && length < kMaxVectors / 2) {
    const std::uint64_t end = fragments[length - 1].offset_bytes + fragments[length - 1].size_bytes;
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
    const auto run = fragments.first(run_length(fragments));
    const std::int64_t wanted = sum_of(run);
    // Whatever went wrong in a run, going fragment by fragment finds out exactly what and where.
    const bool whole = run.size() > 1 && read_run(fd, run, 0) == 0;
    const std::int64_t n = whole ? wanted : move_fragments(fd, run, false);
    if (n < 0) return n;
    moved += n;
    if (n < wanted) break;
    fragments = fragments.subspan(run.size());
  }
  return moved;
}

// File systems that cannot tell what would wait read as usual. Errors are left to the read that may wait.
std::int64_t read_cached(int fd, std::span<const Fragment> fragments) {
  const int error = read_without_waiting(fd, fragments);
  if (error == EOPNOTSUPP) return read_fragments(fd, fragments);
  return error != 0 ? -EAGAIN : sum_of(fragments);
}

std::int64_t read_through_cache(const IoRequest& request) {
  const auto fragments = request.fragments;
  const std::int64_t moved =
      request.page_cache.only ? read_cached(request.fd, fragments) : read_fragments(request.fd, fragments);
  if (request.page_cache.drop && moved > 0) {
    const std::uint64_t begin = fragments.front().offset_bytes;
    const std::uint64_t end = fragments.back().offset_bytes + fragments.back().size_bytes;
    ::posix_fadvise(request.fd, static_cast<off_t>(begin), static_cast<off_t>(end - begin), POSIX_FADV_DONTNEED);
  }
  return moved;
}

// Takes the page faults of `memory`. 0, or an errno: what cannot be had by it may still be had by the kernel's own
// means.
int populate(std::span<std::byte> memory, bool for_writing) {
#ifdef MADV_POPULATE_WRITE
  // Not only the pages that `memory` covers whole.
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(memory.data());
  const std::size_t before = address % system_page_bytes();
  const int advice = for_writing ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
  return ::madvise(memory.data() - before, before + memory.size(), advice) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}

// An emulation of Linux may not know it.
bool can_populate() {
  static const bool can = [] {
    std::byte here{};
    return populate({&here, 1}, true) == 0;
  }();
  return can;
}

// To touch memory that is not mapped, not writable, or that has no page left behind it, ends the process, while the
// kernel gives EFAULT for a read into it. Asked for first, it is an error here, too. On small pages that are there
// already this costs half as much as the copy, on large ones nothing, and of fresh memory it takes the faults at less
// than the copy would. Copying by process_vm_writev(2) costs more and is forbidden in some containers.
std::int64_t make_touchable(std::span<const Fragment> fragments, bool for_writing) {
  std::span<std::byte> run;  // Whole pages.
  const auto ask = [&] { return run.empty() ? 0 : populate(run, for_writing); };
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
    if (ask() != 0) return -EFAULT;
    run = {begin, end};
  }
  return ask() == 0 ? 0 : -EFAULT;
}

std::int64_t scatter(const IoRequest& request) {
  if (const auto error = make_touchable(request.fragments, true)) return error;
  for (const Fragment& fragment : request.fragments) {
    std::memcpy(fragment.memory, request.memory.data() + (fragment.offset_bytes - request.offset_bytes),
                fragment.size_bytes);
  }
  return 0;
}

std::int64_t gather(const IoRequest& request) {
  if (const auto error = make_touchable(request.fragments, false)) return error;
  clear_gaps(request);
  for (const Fragment& fragment : request.fragments) {
    std::memcpy(request.memory.data() + (fragment.offset_bytes - request.offset_bytes), fragment.memory,
                fragment.size_bytes);
  }
  return 0;
}

// What `memory` holds from the first of the fragments to the last.
void count_slot(const IoRequest& request) {
  const std::uint64_t begin = request.fragments.front().offset_bytes;
  const std::uint64_t end = request.fragments.back().offset_bytes + request.fragments.back().size_bytes;
  request.sums->add(begin, request.memory.subspan(begin - request.offset_bytes, end - begin));
}

// A stripe that a gap between two of the fragments lies in is not counted, because it is not read whole and so never
// compared.
void count_between_gaps(const IoRequest& request) {
  constexpr std::uint64_t kStripeBytes = Checksums::kStripeBytes;
  const auto fragments = request.fragments;
  const auto end_of = [](const Fragment& fragment) { return fragment.offset_bytes + fragment.size_bytes; };
  for (std::size_t i = 0; i < fragments.size(); ++i) {
    const bool gap_before = i > 0 && end_of(fragments[i - 1]) < fragments[i].offset_bytes;
    const bool gap_after = i + 1 < fragments.size() && end_of(fragments[i]) < fragments[i + 1].offset_bytes;
    const std::uint64_t begin = fragments[i].offset_bytes;
    const std::uint64_t from = gap_before ? round_up(begin, kStripeBytes) : begin;
    const std::uint64_t to = gap_after ? round_down(end_of(fragments[i]), kStripeBytes) : end_of(fragments[i]);
    if (from < to) request.sums->add(from, {fragments[i].memory + (from - begin), to - from});
  }
}

void count(const IoRequest& request, std::int64_t result) {
  if (result < 0) return;
  switch (request.op) {
    case IoRequest::Op::kReadFragments:
      if (result == sum_of(request.fragments)) count_between_gaps(request);
      return;
    case IoRequest::Op::kWriteFragments:
      if (result != sum_of(request.fragments)) return;
      [[fallthrough]];
    case IoRequest::Op::kGather:
      for (const Fragment& fragment : request.fragments)
        request.sums->add(fragment.offset_bytes, {fragment.memory, fragment.size_bytes});
      return;
    case IoRequest::Op::kScatter:
    case IoRequest::Op::kChecksum:
      return count_slot(request);
    case IoRequest::Op::kRead:
    case IoRequest::Op::kWrite:
    case IoRequest::Op::kPopulate:
      return;
  }
}

std::int64_t move_bytes(const IoRequest& request) {
  switch (request.op) {
    case IoRequest::Op::kRead:
      return retry_interrupted([&] {
        return ::pread(request.fd, request.memory.data(), request.memory.size(),
                       static_cast<off_t>(request.offset_bytes));
      });
    case IoRequest::Op::kWrite:
      return retry_interrupted([&] {
        return ::pwrite(request.fd, request.memory.data(), request.memory.size(),
                        static_cast<off_t>(request.offset_bytes));
      });
    case IoRequest::Op::kReadFragments:
      return read_through_cache(request);
    case IoRequest::Op::kWriteFragments:
      return move_fragments(request.fd, request.fragments, true);
    case IoRequest::Op::kScatter:
      return scatter(request);
    case IoRequest::Op::kGather:
      return gather(request);
    case IoRequest::Op::kChecksum:
      return request.readable ? 0 : make_touchable(request.fragments, false);
    case IoRequest::Op::kPopulate:
      populate(request.memory, request.for_writing);
      return 0;
  }
  return -EINVAL;
}

}  // namespace

std::int64_t carry_out(const IoRequest& request) {
  const std::int64_t result = move_bytes(request);
  if (request.sums) count(request, result);
  return result;
}

int read_without_waiting(int fd, std::span<const Fragment> fragments) {
  while (!fragments.empty()) {
    const auto run = fragments.first(run_length(fragments));
    if (const int error = read_run(fd, run, RWF_NOWAIT)) return error;
    fragments = fragments.subspan(run.size());
  }
  return 0;
}

void clear_gaps(const IoRequest& request) {
  std::byte* at = request.memory.data();
  for (const Fragment& fragment : request.fragments) {
    std::byte* const begin = request.memory.data() + (fragment.offset_bytes - request.offset_bytes);
    std::fill(at, begin, std::byte{});
    at = begin + fragment.size_bytes;
  }
  std::fill(at, request.memory.data() + request.memory.size(), std::byte{});
}

bool is_populated(std::span<std::byte> memory) {
  const std::size_t page_bytes = system_page_bytes();
  const std::size_t before = reinterpret_cast<std::uintptr_t>(memory.data()) % page_bytes;
  memory = {memory.data() - before, before + memory.size()};
  std::array<unsigned char, 1024> pages;
  while (!memory.empty()) {
    const auto part = memory.first(std::min(memory.size(), pages.size() * page_bytes));
    if (::mincore(part.data(), part.size(), pages.data()) != 0) return errno != ENOMEM;
    const auto end = pages.begin() + static_cast<std::ptrdiff_t>((part.size() + page_bytes - 1) / page_bytes);
    if (!std::all_of(pages.begin(), end, [](unsigned char flags) { return flags & 1; })) return false;
    memory = memory.subspan(part.size());
  }
  return true;
}

Workers::Workers(Pool& pool, unsigned tag_limit, IoQueue* listener, std::string fallback_reason)
    : pool_(pool), listener_(listener), fallback_reason_(std::move(fallback_reason)), work_(tag_limit) {
  for (unsigned tag = 0; tag < tag_limit; ++tag) {
    work_[tag].workers = this;
    work_[tag].tag = tag;
  }
  taken_.reserve(tag_limit);
  finished_.reserve(tag_limit);
  queued_.reserve(tag_limit);
}

void Workers::push(unsigned tag, const IoRequest& request) {
  Work& work = work_[tag];
  work.request = request;
  work.subject = request.fd < 0 ? 0 : static_cast<Pool::Subject>(request.fd) + 1;
  {
    const std::lock_guard lock(mutex_);
    work.cancelled = false;
    queued_.push_back(&work.request);
  }
  pool_.post(work);
}

void Workers::cancel(unsigned tag) {
  Work& work = work_[tag];
  {
    const std::lock_guard lock(mutex_);
    if (std::find(queued_.begin(), queued_.end(), &work.request) == queued_.end()) return;
    work.cancelled = true;
  }
  pool_.set_free(work);  // Though a thread may have begun it by now.
}

std::span<const IoCompletion> Workers::wait(std::optional<std::chrono::nanoseconds> timeout) {
  taken_.clear();
  std::unique_lock lock(mutex_);
  const auto ready = [this] { return !finished_.empty() || woken_; };
  if (!timeout) {
    owner_wanted_.wait(lock, ready);
  } else if (timeout->count() > 0) {
    owner_wanted_.wait_for(lock, *timeout, ready);
  }
  woken_ = false;
  taken_.swap(finished_);
  return taken_;
}

void Workers::wake() noexcept {
  {
    const std::lock_guard lock(mutex_);
    woken_ = true;
  }
  owner_wanted_.notify_one();
}

// A wake costs both sides some 10 us and here a core, so reads and writes are reported together where the same transfer
// keeps every thread busy: one of its later ones will wake. The disk waits for everything else.
bool Workers::worth_waking(const IoRequest& done) const {
  const bool moves = done.op == IoRequest::Op::kReadFragments || done.op == IoRequest::Op::kWriteFragments ||
                     done.op == IoRequest::Op::kRead || done.op == IoRequest::Op::kWrite;
  const auto same = [&](const IoRequest* queued) { return queued->transfer == done.transfer; };
  return !moves || std::count_if(queued_.begin(), queued_.end(), same) < std::ptrdiff_t{pool_.thread_count()};
}

void Workers::carry_out(Work& work) noexcept {
  bool cancelled = false;
  {
    const std::lock_guard lock(mutex_);
    std::erase(queued_, &work.request);
    cancelled = work.cancelled;
  }
  const std::int64_t result = cancelled ? -ECANCELED : internal::carry_out(work.request);
  // Waking is done under the lock: the owner may be gone as soon as it knows of the last completion.
  const std::lock_guard lock(mutex_);
  finished_.push_back({work.tag, result});
  if (!worth_waking(work.request)) return;
  listener_ ? listener_->wake() : owner_wanted_.notify_one();
}

}  // namespace flashpack::internal
