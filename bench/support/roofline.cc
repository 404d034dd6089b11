#include "bench/support/roofline.h"

#include <fcntl.h>
#include <liburing.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "bench/support/open_file.h"

namespace flashpack::bench {

namespace {

constexpr std::size_t kChunkBytes = std::size_t{4} << 20;
constexpr std::size_t kBlockBytes = 4096;

class Ring {
 public:
  explicit Ring(unsigned depth) {
    constexpr unsigned kBest = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
    int result = ::io_uring_queue_init(depth, &ring_, kBest);
    if (result == -EINVAL) result = ::io_uring_queue_init(depth, &ring_, 0);
    if (result != 0) throw std::system_error(-result, std::generic_category(), "io_uring_queue_init");
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring() { ::io_uring_queue_exit(&ring_); }

  enum class Op { kRead, kWrite };

  void push(Op op, std::size_t index, int fd, std::span<std::byte> memory, std::uint64_t offset_bytes) {
    io_uring_sqe* sqe = ::io_uring_get_sqe(&ring_);
    const auto length = static_cast<unsigned>(memory.size());
    if (op == Op::kRead) {
      ::io_uring_prep_read(sqe, fd, memory.data(), length, offset_bytes);
    } else {
      ::io_uring_prep_write(sqe, fd, memory.data(), length, offset_bytes);
    }
    sqe->user_data = index;
  }

  struct Done {
    std::size_t index;
    int result;
  };
  Done wait() {
    io_uring_cqe* cqe = nullptr;
    int result = ::io_uring_submit_and_wait(&ring_, 1);
    if (result >= 0) result = ::io_uring_wait_cqe(&ring_, &cqe);
    if (result < 0) throw std::system_error(-result, std::generic_category(), "io_uring_wait_cqe");
    const Done done{static_cast<std::size_t>(cqe->user_data), cqe->res};
    ::io_uring_cqe_seen(&ring_, cqe);
    return done;
  }

 private:
  io_uring ring_{};
};

std::size_t round_up_to_block(std::size_t bytes) { return (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes; }

/// Runs `work` with the number of each of so many threads. Rethrows the last failure.
void in_threads(std::size_t threads, const std::function<void(std::size_t)>& work) {
  std::exception_ptr failure;
  std::mutex failure_mutex;
  {
    std::vector<std::jthread> pool;
    for (std::size_t thread = 0; thread < threads; ++thread) {
      pool.emplace_back([&, thread] {
        try {
          work(thread);
        } catch (...) {
          const std::lock_guard lock(failure_mutex);
          failure = std::current_exception();
        }
      });
    }
  }
  if (failure) std::rethrow_exception(failure);
}

/// Runs `work(offset, size)` for every 4 MiB of `total_bytes`, on one thread per core. Rethrows the last failure.
void for_each_chunk(std::size_t total_bytes, const std::function<void(std::size_t, std::size_t)>& work) {
  const std::size_t threads = std::max(1U, std::thread::hardware_concurrency());
  in_threads(threads, [&](std::size_t thread) {
    for (std::size_t at = thread * kChunkBytes; at < total_bytes; at += threads * kChunkBytes) {
      work(at, std::min(kChunkBytes, total_bytes - at));
    }
  });
}

// Moves the pieces in whole blocks, `depth` in flight. `seconds`, if given, gets the time that each of them took.
void move_direct(Ring::Op op, std::span<const Piece> pieces, unsigned depth, std::vector<double>* seconds = nullptr) {
  using Clock = std::chrono::steady_clock;
  Ring ring(depth);
  std::vector<Clock::time_point> begins(seconds != nullptr ? pieces.size() : 0);
  std::size_t next = 0;
  unsigned in_flight = 0;
  const auto push = [&] {
    const Piece& piece = pieces[next];
    const std::size_t size = round_up_to_block(piece.memory.size());
    if (seconds != nullptr) begins[next] = Clock::now();
    ring.push(op, next, piece.file->fd(), {piece.memory.data(), size}, piece.offset_bytes);
    ++next;
    ++in_flight;
  };
  while (next < pieces.size() && in_flight < depth) push();
  while (in_flight > 0) {
    const Ring::Done done = ring.wait();
    --in_flight;
    if (seconds != nullptr)
      seconds->push_back(std::chrono::duration<double>(Clock::now() - begins[done.index]).count());
    const Piece& piece = pieces[done.index];
    // A local disk never moves less than it was asked for, and a roofline that retries would be too slow.
    if (done.result < 0 || static_cast<std::size_t>(done.result) < piece.memory.size()) {
      throw piece.file->error(op == Ring::Op::kRead ? "read" : "write", done.result < 0 ? -done.result : EIO);
    }
    if (next < pieces.size()) push();
  }
}

}  // namespace

std::vector<Piece> pieces_of(const OpenFile& file, std::span<std::byte> memory, std::size_t piece_bytes) {
  std::vector<Piece> pieces;
  for (std::size_t at = 0; at < memory.size(); at += piece_bytes) {
    pieces.push_back({&file, at, memory.subspan(at, std::min(piece_bytes, memory.size() - at))});
  }
  return pieces;
}

void read_pieces(std::span<const Piece> pieces, unsigned depth) { move_direct(Ring::Op::kRead, pieces, depth); }

void read_pieces_by_threads(std::span<const Piece> pieces, unsigned threads) {
  std::atomic<std::size_t> next = 0;
  in_threads(threads, [&](std::size_t) {
    for (std::size_t at = next++; at < pieces.size(); at = next++) {
      const Piece& piece = pieces[at];
      const ssize_t result = ::pread(piece.file->fd(), piece.memory.data(), round_up_to_block(piece.memory.size()),
                                     static_cast<off_t>(piece.offset_bytes));
      if (result < static_cast<ssize_t>(piece.memory.size())) throw piece.file->error("read", result < 0 ? errno : EIO);
    }
  });
}

std::vector<double> time_reads(std::span<const Piece> pieces, unsigned depth) {
  std::vector<double> seconds;
  move_direct(Ring::Op::kRead, pieces, depth, &seconds);
  return seconds;
}

void read_direct(const std::filesystem::path& path, std::span<std::byte> target) {
  const OpenFile file(path, O_RDONLY | O_DIRECT);
  read_pieces(pieces_of(file, target), kQueueDepth);
}

void write_direct(const std::filesystem::path& path, std::span<std::byte> source) {
  const OpenFile file(path, O_RDWR | O_CREAT | O_DIRECT);
  if (::fallocate(file.fd(), 0, 0, static_cast<off_t>(round_up_to_block(source.size()))) != 0) {
    throw file.error("fallocate");
  }
  move_direct(Ring::Op::kWrite, pieces_of(file, source), kQueueDepth);
  if (::fdatasync(file.fd()) != 0) throw file.error("fdatasync");
}

void read_buffered(const std::filesystem::path& path, std::span<std::byte> target) {
  const OpenFile file(path, O_RDONLY);
  for_each_chunk(target.size(), [&](std::size_t offset, std::size_t size) {
    const ssize_t result = ::pread(file.fd(), target.data() + offset, size, static_cast<off_t>(offset));
    if (result != static_cast<ssize_t>(size)) throw file.error("read", result < 0 ? errno : EIO);
  });
}

void copy_mapped(const std::filesystem::path& path, std::span<std::byte> target) {
  const OpenFile file(path, O_RDONLY);
  void* mapping = ::mmap(nullptr, target.size(), PROT_READ, MAP_SHARED, file.fd(), 0);
  if (mapping == MAP_FAILED) throw file.error("map");
  const auto* bytes = static_cast<const std::byte*>(mapping);
  for_each_chunk(target.size(), [&](std::size_t offset, std::size_t size) {
    std::memcpy(target.data() + offset, bytes + offset, size);
  });
  ::munmap(mapping, target.size());
}

}  // namespace flashpack::bench
