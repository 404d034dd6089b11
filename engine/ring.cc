#include "engine/ring.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cerrno>
#include <system_error>
#include <thread>
#include <utility>

#include "engine/ground/reasons.h"

namespace flashpack::internal {

namespace {

// Two values above all tags. liburing uses the highest value itself.
constexpr std::uint64_t kWakeTag = std::uint64_t{1} << 63;
constexpr std::uint64_t kCancelTag = std::uint64_t{1} << 62;

// A slot is registered at this use; only uses that fill at least half of it count. Registering takes memory for the
// whole slot. A slot that only carries edges of tensors touches little of it, so it is not registered. The second use
// is the first that shows that a slot is used again; later ones were not compared.
constexpr std::uint8_t kRegisterAtUse = 2;

// So many operations are handed to the kernel at once, and fewer if the owner waits. The disk gets none of them before
// the last one is prepared. Batches as large as the queue depth come back together, too, so that the disk idles while
// the next one is prepared: 32 reads of 64 KiB in flight then have 0.87 to 0.91 of the rate of plain io_uring, and 0.96
// or more with batches of 8, 4, 2 or 1 (engine_bench, load/cold/random_64_kib). The kernel merges reads of one batch
// that follow on each other, which speaks for the largest of these.
constexpr unsigned kSubmitAtOnce = 8;

// A kernel that lacks memory or room for completions answers EAGAIN or EBUSY for a moment. If it does so for this long,
// the refusal is taken for final. This and the periods below are bounds, and not tuned.
constexpr std::chrono::seconds kMaxRefusal{1};

// After so many failed wake reads in a row the ring is given up, because without them a wake does not reach it. A
// bound, and not tuned.
constexpr unsigned kMaxFailedWakes = 32;

// Time from a refusal until the ring tries again.
constexpr std::chrono::nanoseconds kRefusalPeriod = std::chrono::milliseconds(1);

// Time between looks whether the kernel has released a closed ring.
constexpr std::chrono::milliseconds kLeavingPeriod{5};

// Constants of <linux/io_uring.h> since Linux 6.3: io_uring_register(2), too, accepts the index of a ring in the
// thread's table in place of its descriptor.
constexpr unsigned kFeatureRegisteredRing = 1u << 13;
constexpr unsigned kUseRegisteredRing = 1u << 31;

bool hidden(const io_uring& ring) { return ring.ring_fd < 0; }

// Makes the system call itself, because liburing knows such rings only since 2.4. Returns the kernel's result, or
// -errno.
int register_with(const io_uring& ring, unsigned operation, const void* argument, unsigned count) {
  const long result = hidden(ring) ? ::syscall(SYS_io_uring_register, ring.enter_ring_fd,
                                               operation | kUseRegisteredRing, argument, count)
                                   : ::syscall(SYS_io_uring_register, ring.ring_fd, operation, argument, count);
  return result < 0 ? -errno : static_cast<int>(result);
}

std::system_error refused(int error_number, const char* call) {
  std::string what = std::string("io_uring: ") + call;
  if (error_number == EPERM || error_number == ENOSYS)
    what += " is blocked by a seccomp profile or kernel.io_uring_disabled";
  return {error_number, std::generic_category(), what};
}

}  // namespace

void Ring::RingDeleter::operator()(io_uring* ring) const noexcept {
  if (hidden(*ring)) {
    io_uring_rsrc_update update{};
    update.offset = static_cast<unsigned>(ring->enter_ring_fd);
    register_with(*ring, IORING_UNREGISTER_RING_FDS, &update, 1);
  }
  ::io_uring_queue_exit(ring);
}

// Climbs down from the rung that is wanted until the kernel takes one.
void Ring::set_up(unsigned entries) {
  constexpr std::array<unsigned, 3> kLadder = {
      IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_CQSIZE,
      IORING_SETUP_COOP_TASKRUN | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_CQSIZE, IORING_SETUP_CQSIZE};
  const Rung best = rung_;
  for (auto rung = static_cast<std::size_t>(best);; ++rung) {
    rung_ = static_cast<Rung>(rung);
    io_uring_params params{};
    params.flags = kLadder[rung];
    params.cq_entries = entries;
    const int result = ::io_uring_queue_init_params(entries, storage_.get(), &params);
    if (result == 0) break;
    if (result != -EINVAL || rung_ == Rung::kBare) throw refused(-result, "io_uring_setup");
  }
  if (rung_ != best) {
    fallback_reason_ = std::string("io_uring: no DEFER_TASKRUN") + (rung_ == Rung::kBare ? " nor COOP_TASKRUN" : "");
    fallback_reason_ += " (Linux 6.1 has both)";
  }
}

Ring::Ring(unsigned in_flight_limit, std::vector<std::span<std::byte>> slots, Rung best)
    : rung_(best),
      storage_(std::make_unique<io_uring>()),
      slots_(std::move(slots)),
      slot_uses_(slots_.size(), 0),
      in_flight_(in_flight_limit) {
  // While the kernel accepts none, a push must find an entry all the same. A tag has three at most: the cancellation of
  // an operation that has ended meanwhile, the next operation, and its cancellation. One more is for the wake read.
  const unsigned entries = std::bit_ceil(3 * in_flight_limit + 1);
  set_up(entries);
  ring_.reset(storage_.get());
  hide();
  if (!(ring_->features & IORING_FEAT_EXT_ARG)) throw refused(ENOSYS, "a wait with a timeout");

  wake_fd_.reset(::eventfd(0, EFD_CLOEXEC));  // A non-blocking descriptor would end the wake read with EAGAIN.
  if (!wake_fd_) throw refused(errno, "eventfd");
  wake_value_ = std::make_unique<std::uint64_t>();
  // Only the kernel holds the pipe's other end, as long as it holds the ring.
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) throw refused(errno, "pipe");
  let_go_.reset(ends[0]);
  const UniqueFd given_away(ends[1]);
  if (register_with(*ring_, IORING_REGISTER_FILES, &ends[1], 1) < 0) let_go_.reset();
  arm_wake();
  // A sandbox may allow the setup and refuse the submission, which this call finds out.
  if (const int submitted = ::io_uring_submit(ring_.get()); submitted < 0) throw refused(-submitted, "io_uring_enter");
  ::io_uring_ring_dontfork(ring_.get());
  // Each read that blocks keeps a thread of the kernel. By default there are four for each CPU, and one file system
  // that does not answer could take them all.
  std::array<unsigned, 2> threads{in_flight_limit, 0};
  register_with(*ring_, IORING_REGISTER_IOWQ_MAX_WORKERS, threads.data(), threads.size());
  completions_.reserve(entries);
}

Ring::~Ring() {
  // The kernel may write to wake_value_ until the wake read has ended; that read may not even have been submitted.
  wake();
  int result = -EBADF;
  while (ring_ && (result = ::io_uring_submit_and_wait(ring_.get(), 1)) == -EINTR) {
  }
  if (result < 0 && let_go_)
    static_cast<void>(wake_value_.release());  // The kernel may still write these eight bytes, so they are leaked.
  // A child may have inherited the ring and would keep the buffers.
  if (ring_ && table_) register_with(*ring_, IORING_UNREGISTER_BUFFERS, nullptr, 0);
}

// Closes the ring's descriptor where the kernel allows it, because a child that inherits it would keep the slots'
// memory.
void Ring::hide() {
  if (!(ring_->features & kFeatureRegisteredRing) || ::io_uring_register_ring_fd(ring_.get()) != 1) return;
  ::close(std::exchange(ring_->ring_fd, -1));
}

io_uring_sqe* Ring::next_sqe() {
  io_uring_sqe* const sqe = ::io_uring_get_sqe(ring_.get());
  assert(sqe && "there are entries for all tags");
  return sqe;
}

void Ring::arm_wake() {
  io_uring_sqe* sqe = next_sqe();
  ::io_uring_prep_read(sqe, wake_fd_.get(), wake_value_.get(), sizeof *wake_value_, 0);
  ::io_uring_sqe_set_data64(sqe, kWakeTag);
}

void Ring::push(unsigned tag, const DiskRequest& request) {
  assert(ring_ && !in_flight_[tag]);
  const bool fixed = register_if_used_again(request.slot, request.memory.size());
  in_flight_[tag] = true;
  io_uring_sqe* sqe = next_sqe();
  prepare(sqe, request, fixed);
  if (request.may_block) ::io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
  ::io_uring_sqe_set_data64(sqe, tag);
  // If the kernel refuses, the entries stay, and wait() finds that out.
  if (::io_uring_sq_ready(ring_.get()) >= kSubmitAtOnce) ::io_uring_submit(ring_.get());
}

void Ring::prepare(io_uring_sqe* sqe, const DiskRequest& request, bool fixed) {
  std::byte* const memory = request.memory.data();
  const auto size = static_cast<unsigned>(request.memory.size());
  if (request.op == DiskRequest::Op::kRead) {
    if (fixed) return ::io_uring_prep_read_fixed(sqe, request.fd, memory, size, request.offset_bytes, request.slot);
    return ::io_uring_prep_read(sqe, request.fd, memory, size, request.offset_bytes);
  }
  if (fixed) return ::io_uring_prep_write_fixed(sqe, request.fd, memory, size, request.offset_bytes, request.slot);
  ::io_uring_prep_write(sqe, request.fd, memory, size, request.offset_bytes);
}

void Ring::cancel(unsigned tag) {
  if (!ring_ || !in_flight_[tag]) return;  // It may have ended in the batch that is being looked at.
  io_uring_sqe* sqe = next_sqe();
  ::io_uring_prep_cancel64(sqe, tag, 0);
  ::io_uring_sqe_set_data64(sqe, kCancelTag);
}

bool Ring::register_if_used_again(int slot, std::size_t used_bytes) {
  if (slot < 0 || slots_.empty() || table_refused_) return false;
  const auto index = static_cast<std::size_t>(slot);
  if (index >= slots_.size()) return false;
  if (slot_uses_[index] > kRegisterAtUse) return true;
  if (used_bytes < slots_[index].size() / 2 || ++slot_uses_[index] < kRegisterAtUse) return false;
  io_uring_rsrc_register table{};
  table.nr = static_cast<unsigned>(slots_.size());
  table.flags = IORING_RSRC_REGISTER_SPARSE;
  int result = table_ ? 0 : register_with(*ring_, IORING_REGISTER_BUFFERS2, &table, sizeof table);
  table_ = result == 0;
  if (table_) {
    const iovec vector{slots_[index].data(), slots_[index].size()};
    io_uring_rsrc_update2 update{};
    update.offset = static_cast<unsigned>(slot);
    update.data = reinterpret_cast<std::uintptr_t>(&vector);
    update.nr = 1;
    result = register_with(*ring_, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof update);
  }
  slot_uses_[index] = kRegisterAtUse + 1;
  if (result >= 0) return true;
  table_refused_ = true;
  const char* const cure = result == -ENOMEM ? " (raise ulimit -l)" : "";
  add_reason(fallback_reason_, "registered buffers: " + std::generic_category().message(-result) + cure);
  return false;
}

// Submits the pushed operations and waits. Returns 0, or -errno if the kernel refused.
int Ring::enter(std::optional<std::chrono::nanoseconds> timeout) {
  if (timeout && timeout->count() <= 0) return std::min(0, ::io_uring_submit_and_get_events(ring_.get()));
  __kernel_timespec spec{};
  if (timeout) spec = {.tv_sec = timeout->count() / 1'000'000'000, .tv_nsec = timeout->count() % 1'000'000'000};
  io_uring_cqe* cqe = nullptr;
  const int result = ::io_uring_submit_and_wait_timeout(ring_.get(), &cqe, 1, timeout ? &spec : nullptr, nullptr);
  return result == -EINTR || result == -ETIME ? 0 : std::min(0, result);
}

void Ring::reap() {
  io_uring_cqe* cqe = nullptr;
  unsigned head = 0;
  unsigned seen = 0;
  bool rearm = false;
  io_uring_for_each_cqe(ring_.get(), head, cqe) {
    ++seen;
    if (cqe->user_data == kWakeTag) {
      rearm = true;
      failed_wakes_ = cqe->res < 0 ? failed_wakes_ + 1 : 0;
      wake_error_ = -cqe->res;
    } else if (cqe->user_data != kCancelTag) {
      complete(static_cast<unsigned>(cqe->user_data), cqe->res);
    }
  }
  ::io_uring_cq_advance(ring_.get(), seen);
  if (!rearm) return;
  wake_pending_.store(false);  // Reset before the owner looks why it was woken, so that no later wake is lost.
  arm_wake();
}

void Ring::complete(unsigned tag, std::int64_t result) {
  in_flight_[tag] = false;
  completions_.push_back({tag, result});
}

// Notes that io_uring_enter has refused. Returns whether it will go on to refuse: most errors stay, and those that may
// pass have then lasted for kMaxRefusal.
bool Ring::note_if_refused(int error_number) {
  if (error_number != EAGAIN && error_number != EBUSY && error_number != ENOMEM) return true;
  const auto now = std::chrono::steady_clock::now();
  if (refused_since_ == std::chrono::steady_clock::time_point{}) refused_since_ = now;
  return now - refused_since_ >= kMaxRefusal;
}

// Closes the ring, which the kernel or a sandbox has begun to refuse. Operations that the kernel has not taken come
// back at once. The others end some time after the ring is closed; only the pipe tells when, because the kernel closes
// it last.
void Ring::leave(int error_number, const char* call) {
  add_reason(fallback_reason_, refused(error_number, call).what());
  const io_uring_sq& queue = ring_->sq;
  for (unsigned at = *queue.khead; at != queue.sqe_tail; ++at) {
    const std::uint64_t tag = queue.sqes[at & queue.ring_mask].user_data;
    if (tag != kWakeTag && tag != kCancelTag) complete(static_cast<unsigned>(tag), -EAGAIN);
  }
  ring_.reset();
}

void Ring::wait_without_ring(std::optional<std::chrono::nanoseconds> timeout) {
  // The wait is short if it may miss a wake: a read of the wake descriptor that the kernel still has may take the wake
  // first, or the descriptor has failed.
  if (let_go_ || wake_is_lost_)
    timeout = std::min<std::chrono::nanoseconds>(timeout.value_or(kLeavingPeriod), kLeavingPeriod);
  const int wait = timeout ? static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(*timeout).count()) : -1;
  std::array<pollfd, 2> ready{{{wake_is_lost_ ? -1 : wake_fd_.get(), POLLIN, 0}, {let_go_.get(), POLLIN, 0}}};
  if (::poll(ready.data(), ready.size(), wait) <= 0) return;
  if (ready[0].revents != 0) {
    std::uint64_t value = 0;
    const iovec vector{&value, sizeof value};
    const ssize_t read_bytes = ::preadv2(wake_fd_.get(), &vector, 1, -1, RWF_NOWAIT);
    wake_is_lost_ = read_bytes < 0 && errno != EAGAIN && errno != EINTR;
    wake_pending_.store(false);  // Reset after the event is read and before the owner looks why it was woken, so that
                                 // no later wake is lost.
  }
  if (ready[1].revents == 0) return;
  if ((ready[1].revents & POLLHUP) == 0) {
    // The program has closed the pipe, and its number may be another file's by now. Without it nobody can tell when
    // the kernel has ended the operations, so they stay under way, because it may still write to their memory.
    static_cast<void>(let_go_.release());
    return;
  }
  let_go_.reset();
  for (unsigned tag = 0; tag < in_flight_.size(); ++tag) {
    if (in_flight_[tag]) complete(tag, -EAGAIN);  // Operations may be repeated, done or not.
  }
}

std::span<const IoCompletion> Ring::wait(std::optional<std::chrono::nanoseconds> timeout) {
  completions_.clear();
  if (!ring_) {
    wait_without_ring(timeout);
    return completions_;
  }
  const int result = enter(timeout);
  reap();
  if (failed_wakes_ > kMaxFailedWakes) {
    leave(wake_error_, "the read of an eventfd");
  } else if (result == 0) {
    refused_since_ = {};
  } else if (note_if_refused(-result)) {
    leave(-result, "io_uring_enter");
  } else if (completions_.empty()) {
    std::this_thread::sleep_for(std::min(timeout.value_or(kRefusalPeriod), kRefusalPeriod));
  }
  return completions_;
}

void Ring::wake() noexcept {
  if (wake_pending_.exchange(true)) return;
  const std::uint64_t one = 1;
  while (::write(wake_fd_.get(), &one, sizeof one) < 0 && errno == EINTR) {
  }
}

}  // namespace flashpack::internal
