/// The loop: chunks through slots and into place.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "engine/copier.h"
#include "engine/io_queue.h"
#include "engine/transfer_state.h"

namespace flashpack::engine {

/// Serves transfers with two queues: `disk` for direct I/O, `workers` for everything that touches bytes with a CPU.
/// They may be the same queue. A chunk that is read lives so:
///
///   in place:            [populating ->] direct   -> [counting ->]                       delivered
///   through a slot:                      direct   ->                          copying -> delivered
///   to a device:                         direct   -> [counting -> waiting ->] copying -> delivered
///   page cache:                          buffered ->                                     delivered
///   page cache, device:                  buffered -> [waiting ->]             copying -> delivered
///
/// and one that is written:
///
///   in place:            [populating ->]                           direct   -> delivered
///   through a slot:                    gathering ->                direct   -> delivered
///   from a device:       [waiting ->]  gathering -> [counting ->]  direct   -> delivered
///   page cache:                                                    buffered -> delivered
///   page cache, device:  [waiting ->]  gathering ->                buffered -> delivered
///
/// where counting is for checksums; whatever else a worker does with bytes, or may do ahead of the disk, counts them by
/// the way.
///
/// A chunk for a device waits with its slot until the caller's stream has come far enough.
/// When its transfer fails it is abandoned: cancelled, waited for, and no longer counted against the depth, so that a
/// read that is stuck in the kernel does not hold up other transfers.
///
/// run() is called by one thread, the driver; it does no byte work and allocates nothing per chunk.
class Pipeline final : public Driver {
 public:
  struct Limits {
    std::uint32_t queue_depth;   ///< Direct reads in flight, or writes, with those whose slots are being filled.
    std::uint32_t worker_depth;  ///< Of each kind of work, given to the workers at a time; enough that they stay busy
                                 ///< while the driver sleeps.
  };

  /// The tags that queues of such a pipeline must allow.
  static unsigned tag_limit(Limits limits, std::size_t slot_count);

  /// Borrows the queues, the copier and the slots' memory. `copier` is null for an engine of the host.
  Pipeline(IoQueue& disk, IoQueue& workers, Copier* copier, std::vector<std::span<std::byte>> slots, Limits limits);

  /// Any thread: hands a prepared transfer to the driver.
  void start(std::shared_ptr<TransferState> transfer);
  /// Any thread.
  void attend() noexcept override;
  /// Any thread: run() returns when all that was started has ended.
  void close() noexcept;

  void run();

 private:
  enum class Stage : std::uint8_t {
    kFree,
    kPopulating,
    kDirect,
    kWaiting,
    kCopying,
    kGathering,
    kCounting,
    kBuffered,
    kAbandoned,
  };
  static constexpr std::size_t kStages = 9;

  /// One chunk under way. Its index is the tag of its operations.
  struct Job {
    Stage stage = Stage::kFree;
    TransferState* transfer = nullptr;
    const Chunk* chunk = nullptr;
    int slot = -1;
    std::uint64_t offset_bytes = 0;  // Where in the file `memory` begins.
    std::span<std::byte> memory;     // The slot's, or in place the target or source itself.
    Piece whole{};                   // Of a buffered job with a slot: `memory` as the one piece that is moved.
    std::uint64_t done_bytes = 0;    // Whole blocks of `memory` that have been moved.
    unsigned stalls = 0;             // Results in a row that moved no new block.
    bool counted = false;            // For checksums, or given to somebody who does.
    bool to_cache = false;           // Of a slot that is being filled for the file: it is written buffered.
    bool only_cached = false;        // Of a buffered read: it may be refused because the disk would be needed.
  };

  void admit();
  bool finished() {
    const std::lock_guard lock(mutex_);
    return closing_ && active_.empty() && inbox_.empty();
  }
  void attend_to_cancels_and_deadlines();
  void attend_to_gates();
  static bool behind_gate(const TransferState& transfer) { return transfer.gate && !transfer.failure; }
  void reap(std::optional<std::chrono::nanoseconds> patience);
  std::optional<std::chrono::nanoseconds> patience(bool look_again);

  std::uint32_t& count(Stage stage) { return counts_[static_cast<std::size_t>(stage)]; }
  void enter(Job& job, Stage stage) {
    --count(job.stage);
    ++count(job.stage = stage);
  }

  /// Jobs that are with the disk, or bound for it with a slot.
  std::uint32_t depth() { return count(Stage::kDirect) + count(Stage::kGathering); }

  std::span<std::byte> slot_memory(const Job& job) const { return slots_[static_cast<std::size_t>(job.slot)]; }

  bool issue();
  bool issue_buffered(TransferState& transfer, const Chunk& chunk);
  bool issue_direct(TransferState& transfer, const Chunk& chunk);
  bool issue_in_place(TransferState& transfer, const Chunk& chunk);
  bool issue_staged(TransferState& transfer, const Chunk& chunk);

  unsigned open_job(TransferState& transfer, const Chunk& chunk);
  std::optional<unsigned> open_job_with_slot(TransferState& transfer, const Chunk& chunk);
  void move_direct(unsigned tag);
  void move_buffered(unsigned tag);
  void copy(unsigned tag);
  void count_bytes(unsigned tag, PieceSums* sums);
  static PieceSums* take_sums(Job& job);

  void complete(IoCompletion completion);
  void on_direct(unsigned tag, std::int64_t result);
  void on_buffered(unsigned tag, std::int64_t result);
  void on_counted(unsigned tag);
  void write_slot(unsigned tag);
  void on_copied(unsigned tag, std::error_code error);
  void refuse_direct(unsigned tag);
  void deliver(unsigned tag);
  void give_back(unsigned tag);
  void fail(unsigned tag, std::error_code code);
  void give_up(TransferState& transfer, const Error& error);
  void close_job(unsigned tag);
  void end(TransferState& transfer);
  static void verify(const Source& source, TransferState& transfer);

  IoQueue& disk_;
  IoQueue& workers_;
  Copier* const copier_;
  const std::vector<std::span<std::byte>> slots_;
  const Limits limits_;

  std::vector<Job> jobs_;
  std::vector<unsigned> free_jobs_;
  std::vector<int> free_slots_;                  // Last in, first out: few slots are ever touched when few are needed.
  std::array<std::uint32_t, kStages> counts_{};  // Jobs in each stage.
  std::vector<std::shared_ptr<TransferState>> active_;    // In the order they were started.
  std::vector<std::shared_ptr<TransferState>> admitted_;  // Scratch of admit().

  std::atomic<bool> attention_ = false;

  std::mutex mutex_;  // Protects the rest.
  std::vector<std::shared_ptr<TransferState>> inbox_;
  bool closing_ = false;
};

}  // namespace flashpack::engine
