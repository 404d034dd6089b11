#include "engine/ring.h"

#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cassert>
#include <cerrno>
#include <system_error>
#include <thread>
#include <utility>

namespace flashpack::engine {

namespace {

// Above all tags; liburing keeps the highest value for itself.
constexpr std::uint64_t kWakeTag = std::uint64_t{1} << 63;
constexpr std::uint64_t kCancelTag = std::uint64_t{1} << 62;

// Uses of a slot before it is worth registering, those that fill half of it or more. Registering takes all of the slot
// from the system and pins it, which costs more than the edges of many tensors that come through it.
constexpr std::uint8_t kRegisterAtUse = 2;

// Of <linux/io_uring.h> since Linux 6.3: a ring that this thread has registered is known by its place in the thread's
// table, also to io_uring_register(2).
constexpr unsigned kFeatureRegisteredRing = 1u << 13;
constexpr unsigned kUseRegisteredRing = 1u << 31;

bool hidden(const io_uring& ring) { return ring.ring_fd < 0; }

// By system call, because liburing knows hidden rings only since 2.4. Gives what the kernel gives, or -errno.
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
    io_uring_rsrc_update place{};
    place.offset = static_cast<unsigned>(ring->enter_ring_fd);
    register_with(*ring, IORING_UNREGISTER_RING_FDS, &place, 1);
  }
  ::io_uring_queue_exit(ring);
}

Ring::Ring(unsigned in_flight_limit, std::vector<std::span<std::byte>> slots, Rung best)
    : rung_(best), storage_(std::make_unique<io_uring>()), slots_(std::move(slots)), slot_uses_(slots_.size(), 0) {
  const unsigned entries = std::bit_ceil(in_flight_limit + 1);  // One more for the wake read.
  constexpr std::array<unsigned, 3> kLadder = {
      IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_CQSIZE,
      IORING_SETUP_COOP_TASKRUN | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_CQSIZE, IORING_SETUP_CQSIZE};
  for (auto rung = static_cast<std::size_t>(best);; ++rung) {
    rung_ = static_cast<Rung>(rung);
    io_uring_params params{};
    params.flags = kLadder[rung];
    params.cq_entries = 2 * entries;
    const int result = ::io_uring_queue_init_params(entries, storage_.get(), &params);
    if (result == 0) break;
    if (result != -EINVAL || rung_ == Rung::kBare) throw refused(-result, "io_uring_setup");
  }
  if (rung_ != best) {
    fallback_reason_ = std::string("io_uring: no DEFER_TASKRUN") + (rung_ == Rung::kBare ? " nor COOP_TASKRUN" : "");
    fallback_reason_ += " (Linux 6.1 has both)";
  }
  ring_.reset(storage_.get());
  hide();
  if (!(ring_->features & IORING_FEAT_EXT_ARG)) throw refused(ENOSYS, "a wait with a timeout");

  wake_fd_.reset(::eventfd(0, EFD_CLOEXEC));  // Blocking, or the armed read would end at once with EAGAIN.
  if (!wake_fd_) throw refused(errno, "eventfd");
  arm_wake();
  // Submitting now shows a sandbox that allows the setup and refuses the rest.
  if (const int submitted = ::io_uring_submit(ring_.get()); submitted < 0) throw refused(-submitted, "io_uring_enter");
  ::io_uring_ring_dontfork(ring_.get());
  completions_.reserve(2 * entries);
}

Ring::~Ring() {
  // The kernel holds wake_value_ until the armed read is over; it may not even have been submitted yet.
  wake();
  while (::io_uring_submit_and_wait(ring_.get(), 1) == -EINTR) {
  }
  // A child may have inherited the ring all the same, and keeps it.
  if (table_) register_with(*ring_, IORING_UNREGISTER_BUFFERS, nullptr, 0);
}

// A descriptor would be inherited by children, and who holds the ring holds its memory.
void Ring::hide() {
  if (!(ring_->features & kFeatureRegisteredRing) || ::io_uring_register_ring_fd(ring_.get()) != 1) return;
  ::close(std::exchange(ring_->ring_fd, -1));
}

io_uring_sqe* Ring::next_sqe() {
  io_uring_sqe* sqe = ::io_uring_get_sqe(ring_.get());
  if (!sqe) {  // More pushes than the limit allows in flight since the last wait: retries. Make room.
    ::io_uring_submit(ring_.get());
    sqe = ::io_uring_get_sqe(ring_.get());
  }
  assert(sqe);
  return sqe;
}

void Ring::arm_wake() {
  io_uring_sqe* sqe = next_sqe();
  ::io_uring_prep_read(sqe, wake_fd_.get(), &wake_value_, sizeof wake_value_, 0);
  ::io_uring_sqe_set_data64(sqe, kWakeTag);
}

void Ring::push(unsigned tag, const IoRequest& request) {
  const bool fixed = registered(request.slot, request.memory.size());
  io_uring_sqe* sqe = next_sqe();
  prepare(sqe, request, fixed);
  if (request.may_block) ::io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
  ::io_uring_sqe_set_data64(sqe, tag);
}

void Ring::prepare(io_uring_sqe* sqe, const IoRequest& request, bool fixed) {
  std::byte* const memory = request.memory.data();
  const auto size = static_cast<unsigned>(request.memory.size());
  assert(request.op == IoRequest::Op::kRead || request.op == IoRequest::Op::kWrite);
  if (request.op == IoRequest::Op::kRead) {
    if (fixed) return ::io_uring_prep_read_fixed(sqe, request.fd, memory, size, request.offset_bytes, request.slot);
    return ::io_uring_prep_read(sqe, request.fd, memory, size, request.offset_bytes);
  }
  if (fixed) return ::io_uring_prep_write_fixed(sqe, request.fd, memory, size, request.offset_bytes, request.slot);
  ::io_uring_prep_write(sqe, request.fd, memory, size, request.offset_bytes);
}

void Ring::cancel(unsigned tag) {
  io_uring_sqe* sqe = next_sqe();
  ::io_uring_prep_cancel64(sqe, tag, 0);
  ::io_uring_sqe_set_data64(sqe, kCancelTag);
}

bool Ring::registered(int slot, std::size_t used_bytes) {
  if (slot < 0 || slots_.empty() || table_refused_) return false;
  const auto index = static_cast<std::size_t>(slot);
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
  fallback_reason_ += (fallback_reason_.empty() ? "" : "; ");
  fallback_reason_ += "registered buffers: " + std::generic_category().message(-result);
  if (result == -ENOMEM) fallback_reason_ += " (raise ulimit -l)";
  return false;
}

std::span<const IoCompletion> Ring::wait(std::optional<std::chrono::nanoseconds> timeout) {
  completions_.clear();
  int result = 0;
  io_uring_cqe* cqe = nullptr;
  if (timeout && timeout->count() <= 0) {
    result = ::io_uring_submit_and_get_events(ring_.get());
  } else {
    __kernel_timespec spec{};
    if (timeout) spec = {.tv_sec = timeout->count() / 1'000'000'000, .tv_nsec = timeout->count() % 1'000'000'000};
    result = ::io_uring_submit_and_wait_timeout(ring_.get(), &cqe, 1, timeout ? &spec : nullptr, nullptr);
  }
  // EINTR, ETIME, EAGAIN and EBUSY are answered by reaping and coming back. Anything else (a sandbox that closed after
  // the ring was made) leaves operations that nobody can recall: they are waited for, gently, since their memory is not
  // ours.
  if (result < 0 && result != -EINTR && result != -ETIME && result != -EAGAIN && result != -EBUSY) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  unsigned head = 0;
  unsigned seen = 0;
  bool rearm = false;
  io_uring_for_each_cqe(ring_.get(), head, cqe) {
    ++seen;
    if (cqe->user_data == kWakeTag) {
      rearm = true;
    } else if (cqe->user_data != kCancelTag) {
      completions_.push_back({static_cast<unsigned>(cqe->user_data), cqe->res});
    }
  }
  ::io_uring_cq_advance(ring_.get(), seen);
  if (rearm) {
    wake_pending_.store(false);  // Before the owner looks at what it was woken for.
    arm_wake();
  }
  return completions_;
}

void Ring::wake() noexcept {
  if (wake_pending_.exchange(true)) return;
  const std::uint64_t one = 1;
  while (::write(wake_fd_.get(), &one, sizeof one) < 0 && errno == EINTR) {
  }
}

}  // namespace flashpack::engine
